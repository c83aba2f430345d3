"""Self-resampling: teacher forcing on a model's own mistakes (arXiv 2512.15702).

Forced on clean frames only, a model first meets its own in a rollout, and they lead it astray. So
in some steps the history is what the model itself makes of it, in one step from noise levels
between a low one, which changes little, and a high one, which leaves little of the frame:

    (1) x0_hat^i = f(x_sigma^i, sigma_i | x0^{<i}, c),  f(x, s) = x - s v(x, s),  sigma_i ~ U(a, b)

What it has to predict are the data all the same: it learns to lead back to them. The first chunk
stays, as a rollout's is given or takes more steps. The paper makes chunk after chunk, each after
those already made; here one pass makes all, each after clean ones.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from cfpp import flow
from cfpp.models.network import Condition, Network, Params
from cfpp.stages.stage import draw_sigma


def resample(
    rng: jax.Array,
    network: Network,
    params: Params,
    clean: jax.Array,
    condition: Condition,
    rate: float,
    sigma: Sequence[float],
) -> jax.Array:
    """The history to force a model on in this step: clean, or all but the first chunk made by (1).

    Args:
      params: of the model, which makes it forced on clean frames.
      clean: latents of whole clips, `[B, F, H, W, C]`.
      rate: the probability that it is made, for all clips together.
      sigma: the range (a, b) of noise levels, one drawn for each chunk of each clip.

    Returns:
      `[B, F, H, W, C]`.
    """
    if not rate:
        return clean
    choice_rng, sigma_rng, noise_rng = jax.random.split(rng, 3)
    clips, frames = clean.shape[:2]

    def made():
        low, high = sigma
        uniform = draw_sigma(sigma_rng, network.pattern, (clips, 1, frames), 1.0)
        level = low + (high - low) * uniform  # [B, F]
        x = flow.interpolate(clean, jax.random.normal(noise_rng, clean.shape), level)
        x0 = flow.to_x0(x, network.teacher_forced(params, clean, condition)(x, level), level)
        is_first = network.pattern.chunk_index(frames)[:, None, None, None] == 0
        return jnp.where(is_first, clean, x0)

    return jax.lax.cond(jax.random.bernoulli(choice_rng, rate), made, lambda: clean)
