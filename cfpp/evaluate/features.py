"""The feature space of the Frechet distance: what moves and how it looks, wherever it is.

A fixed bank of random filters looks at a frame and at its change since the frame before, at full
and at half resolution; the rectified answers are averaged over the picture. Random convolutional
features measure distances between sets of pictures well where no network pretrained on such
pictures exists (Naeem et al. 2020, arXiv 2002.09797). Nothing is trained, so the numbers of
different runs can be compared. Features of a network trained to tell the actions were tried
first: they are blind to all that actions do not move (clips that lose both balls of the arena
scored like real ones, and forty times as far as real ones here).
"""

import einops
import jax
import jax.numpy as jnp
import numpy as np

from cfpp.models import codec

FILTERS = 16  # at each of two resolutions
KERNEL = 5  # pixels
WINDOW = 3  # frames that one feature vector sees


def motion_features(video: np.ndarray) -> np.ndarray:
    """Features of every frame and its predecessor.

    Args:
      video: uint8 `[E, T, H, W, 3]`.

    Returns:
      float32 `[E, T-1, 2 * FILTERS]`.
    """
    # `RandomState` promises the same stream with every NumPy.
    bank = np.random.RandomState(0).normal(size=(2, KERNEL, KERNEL, 6, FILTERS))
    bank = (bank / np.sqrt(KERNEL * KERNEL * 6)).astype(np.float32)
    return np.stack([np.asarray(_features(clip, bank)) for clip in video])


@jax.jit
def _features(clip: jax.Array, bank: jax.Array) -> jax.Array:
    clip = codec.encode(clip)
    even = clip[:, : clip.shape[1] // 2 * 2, : clip.shape[2] // 2 * 2]
    half = einops.reduce(even, "t (h p) (w q) c -> t h w c", "mean", p=2, q=2)
    pooled = []
    for frames, filters in zip((clip, half), bank, strict=True):
        pair = jnp.concatenate([frames[1:], frames[1:] - frames[:-1]], axis=-1)
        answer = jax.lax.conv_general_dilated(
            pair, filters, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        pooled.append(jax.nn.relu(answer).mean((1, 2)))
    return jnp.concatenate(pooled, axis=-1)


def windows(video: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Features of every window of `WINDOW` frames, each feature divided by its `scale`.

    Args:
      video: uint8 `[E, T, H, W, 3]`.
      scale: float `[2 * FILTERS]`, see `spread`.

    Returns:
      float64 `[E, T - WINDOW + 1, (WINDOW - 1) * 2 * FILTERS]`.
    """
    features = motion_features(video) / scale
    view = np.lib.stride_tricks.sliding_window_view(features, WINDOW - 1, axis=1)
    return einops.rearrange(view, "e t d w -> e t (w d)")


def spread(video: np.ndarray) -> np.ndarray:
    """Standard deviation of each feature over real clips: the unit in which to measure it."""
    features = motion_features(video).astype(np.float64)
    deviation = features.std((0, 1))
    # A feature that never changes in real clips keeps a unit, so that a change of it is seen.
    return np.maximum(deviation, 1e-3 * np.abs(features).mean((0, 1)) + 1e-6)
