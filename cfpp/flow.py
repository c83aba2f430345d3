"""Flow matching: noise levels, the two readings of a network's output, solver steps, guidance.

With clean data x0, Gaussian noise e and a noise level sigma in [0, 1]:

    (1) x_sigma = (1 - sigma) x0 + sigma e
    (2) v       = e - x0                          the velocity, d x_sigma / d sigma
    (3) x0      = x_sigma - sigma v
    (4) shift   : sigma -> s sigma / (1 + (s - 1) sigma)
    (5) grid    : sigma_k = shift(1 - k / N), k = 0 .. N, so sigma_0 = 1 and sigma_N = 0
    (6) guidance: v = v_uncond + w (v_cond - v_uncond)

Arrays are `[batch, frames, height, width, channels]`, noise levels `[batch, frames]`, or anything
that broadcasts to it; every function takes both and expands the noise level by itself.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

FLOOR = 0.05  # the least noise level that x - x0 is divided by

Velocity = Callable[[jax.Array, jax.Array], jax.Array]  # (x_sigma, sigma) -> v


def expand(sigma: jax.Array, x: jax.Array) -> jax.Array:
    """Appends axes to `sigma`, `[batch, frames]` or less, until it broadcasts against `x`."""
    sigma = jnp.asarray(sigma)
    return sigma.reshape(sigma.shape + (1,) * (x.ndim - 2)) if sigma.ndim else sigma


def interpolate(x0: jax.Array, noise: jax.Array, sigma: jax.Array) -> jax.Array:
    """The noised data x_sigma, equation (1)."""
    sigma = expand(sigma, x0)
    return (1 - sigma) * x0 + sigma * noise


def velocity(x0: jax.Array, noise: jax.Array) -> jax.Array:
    """The velocity of the straight path from `x0` to `noise`, equation (2)."""
    return noise - x0


def to_x0(x: jax.Array, v: jax.Array, sigma: jax.Array) -> jax.Array:
    """The clean data that a velocity at `x` points to, equation (3)."""
    return x - expand(sigma, x) * v


def to_velocity(x: jax.Array, x0: jax.Array, sigma: jax.Array) -> jax.Array:
    """The velocity that leads from `x0` to `x`: the inverse of `to_x0` for sigma >= `FLOOR`.

    Below `FLOOR` the division is by `FLOOR`, so that the velocity stays bounded at sigma = 0.
    """
    return (x - x0) / jnp.maximum(expand(sigma, x), FLOOR)


def shift(sigma, s: float):
    """The timestep shift, equation (4). Keeps 0 and 1; s > 1 spends more steps at high noise."""
    return s * sigma / (1 + (s - 1) * sigma)


def grid(steps: int, s: float) -> np.ndarray:
    """The solver grid of equation (5): float32 `[steps + 1]`, falling from 1 to 0.

    Raises:
      ValueError: there is no step.
    """
    if steps < 1:
        raise ValueError(f"a solver grid needs at least 1 step, got {steps}")
    return shift(1 - np.arange(steps + 1) / steps, s).astype(np.float32)


def schedule(positions: Sequence[float], s: float) -> np.ndarray:
    """The noise levels of a few-step sampler, ending in 0: float32 `[len(positions) + 1]`.

    Args:
      positions: falling positions on the unshifted 1000-grid, such as `[1000, 500]`. The first is
        1000, since sampling starts from noise alone.
      s: the timestep shift.

    Raises:
      ValueError: the positions do not start at 1000, or do not fall, or not to above 0.
    """
    positions = np.asarray(positions, np.float64)
    if not positions.size or positions[0] != 1000 or not np.all(np.diff(positions, append=0.0) < 0):
        raise ValueError(
            f"sampling positions must fall, from 1000 to above 0, got {positions.tolist()}"
        )
    return np.append(shift(positions / 1000, s), 0.0).astype(np.float32)


def euler_step(
    x: jax.Array, v: jax.Array, sigma: jax.Array, sigma_next: jax.Array, noise: jax.Array = None
) -> jax.Array:
    """One Euler step of the probability-flow ODE from `sigma` to `sigma_next`. Uses no noise."""
    del noise
    return x - expand(sigma - sigma_next, x) * v


def heun_step(
    velocity_fn: Velocity, x: jax.Array, sigma: jax.Array, sigma_next: jax.Array
) -> jax.Array:
    """One Heun step: Euler with the average of the velocities at both ends.

    Where `sigma_next` is 0 the Euler step stands (Karras et al. 2022, algorithm 1): there the mean
    of e - x0 is -x0 whatever the data, and not what a path to a single picture ends with.
    """
    v = velocity_fn(x, sigma)
    x_euler = euler_step(x, v, sigma, sigma_next)
    v_end = velocity_fn(x_euler, sigma_next)
    v_mean = jnp.where(expand(sigma_next, x) > 0, (v + v_end) / 2, v)
    return euler_step(x, v_mean, sigma, sigma_next)


SOLVERS = {
    "euler": lambda velocity_fn, x, *sigmas: euler_step(x, velocity_fn(x, sigmas[0]), *sigmas),
    "heun": heun_step,
}
"""Steps of the probability-flow ODE by name: `(velocity_fn, x, sigma, sigma_next) -> x`."""


def consistency_step(
    x: jax.Array, v: jax.Array, sigma: jax.Array, sigma_next: jax.Array, noise: jax.Array
) -> jax.Array:
    """One step of the consistency sampler: predict x0, then noise it afresh to `sigma_next`."""
    return interpolate(to_x0(x, v, sigma), noise, sigma_next)


def guide(v_cond: jax.Array, v_uncond: jax.Array, weight: float) -> jax.Array:
    """Classifier-free guidance, equation (6). `weight` 1 is no guidance."""
    return v_uncond + weight * (v_cond - v_uncond)


def matching_loss(
    velocity_fn: Velocity, x0: jax.Array, noise: jax.Array, sigma: jax.Array, floor: float = FLOOR
) -> jax.Array:
    """Flow matching: the squared error of the velocity, one value a frame, `[batch, frames]`.

    Args:
      velocity_fn: the network.
      x0, noise: `[batch, frames, height, width, channels]`.
      sigma: `[batch, frames]`.
      floor: noise levels below this weigh less, by (clip(sigma, FLOOR, floor) / floor)^2: the raw
        error of a network that predicts x0 then counts the same at all of them, down to `FLOOR`,
        that of `to_velocity`. `FLOOR` or less weighs all alike.
    """
    v = velocity_fn(interpolate(x0, noise, sigma), sigma)
    error = jnp.mean(jnp.square(v - velocity(x0, noise)), axis=(2, 3, 4))
    floor = max(floor, FLOOR)
    return error * jnp.square(jnp.clip(sigma, FLOOR, floor) / floor)


def bell_weight(sigma: jax.Array, s: float) -> jax.Array:
    """The weight of a noise level by which Wan was trained, and the public code's stage 1.

    A bell around 1/2 that comes down to 0 at both ends: exp(-2 (sigma - 1/2)^2) - exp(-1/2).

    Args:
      sigma: noise levels.
      s: the shift that they are drawn with; over all levels of that the mean is 1.
    """
    bell = lambda sigma, exp: exp(-2 * (sigma - 0.5) ** 2) - np.exp(-0.5)
    return bell(sigma, jnp.exp) / bell(grid(1000, s)[:-1], np.exp).mean()
