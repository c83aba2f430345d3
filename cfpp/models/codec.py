"""Between videos of bytes and the latents that networks see. Pixel models need no VAE."""

import jax
import jax.numpy as jnp
import numpy as np


def encode(video: jax.Array) -> jax.Array:
    """Maps a video to latents, value by value.

    Args:
      video: of any shape, `[..., H, W, C]`; uint8, or floats, which are latents already.

    Returns:
      float32 of the same shape: bytes 0 .. 255 as -1 .. 1, latents as they are.

    Raises:
      ValueError: it is of another type.
    """
    if jnp.issubdtype(video.dtype, jnp.floating):
        return video.astype(jnp.float32)
    if video.dtype != jnp.uint8:
        raise ValueError(f"a video is uint8, or float latents; got {video.dtype}")
    return video.astype(jnp.float32) / 127.5 - 1


def decode(latents: jax.Array, dtype: np.dtype) -> jax.Array:
    """Maps latents back to what a video of `dtype` holds: the inverse of `encode`, value by value.

    Args:
      latents: float `[..., H, W, C]`.
      dtype: uint8 for bytes, where what lies outside of [-1, 1] is clipped; or of floats, which are
        latents themselves.

    Returns:
      Of that type and the same shape.
    """
    if jnp.issubdtype(dtype, jnp.floating):
        return latents.astype(dtype)
    return jnp.clip(jnp.round((latents + 1) * 127.5), 0, 255).astype(jnp.uint8)
