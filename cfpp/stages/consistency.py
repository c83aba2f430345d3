"""Stage 2: causal consistency distillation. The target comes from one online teacher step.

With the solver grid sigma_0 = 1 > ... > sigma_N = 0, k drawn from 0 .. N - 1 for each chunk,
sigma = sigma_k and sigma' = sigma_{k+1}, all networks teacher-forced on the clean history:

    (1) x_sigma'   = one Euler or Heun step of the guided teacher from x_sigma
    (2) f(x, s)    = x - s v(x, s)
    (3) L          = d(f_theta(x_sigma, sigma), stopgrad f_ema(x_sigma', sigma'))

d is the squared error or the pseudo-Huber distance. At sigma' = 0, f is the identity: the last pair
ties the map to the teacher's own endpoint, so it is drawn like every other. What it says comes down
to sigma_0 level by level: N may start small, and double (Song and Dhariwal 2023, section 3.4).
"""

import jax
import jax.numpy as jnp
import numpy as np

from cfpp import flow
from cfpp.models.network import cast_products
from cfpp.rollout.sampler import student_sampler
from cfpp.stages.stage import (
    FLOATS,
    Parent,
    Stage,
    advance,
    causal_network,
    check_choice,
    descend,
    inherit,
    optimizer,
    per_chunk,
    repeat_draws,
    start,
    unpack,
)


def mse(a: jax.Array, b: jax.Array) -> jax.Array:
    """The mean squared error of each frame, `[batch, frames]`."""
    return jnp.mean(jnp.square(a - b), axis=(2, 3, 4))


def pseudo_huber(a: jax.Array, b: jax.Array) -> jax.Array:
    """sqrt(|a - b|^2 + c^2) - c of each frame, `[batch, frames]`.

    c is 0.00054 sqrt(n), of n values in a frame (Song and Dhariwal 2023, section 3.3).
    """
    c = 0.00054 * np.sqrt(np.prod(a.shape[2:]))
    return jnp.sqrt(jnp.sum(jnp.square(a - b), axis=(2, 3, 4)) + c**2) - c


DISTANCES = {"mse": mse, "pseudo_huber": pseudo_huber}
"""The distance d of equation (3) by name."""


def target(
    ema: flow.Velocity,
    teacher: flow.Velocity,
    x: jax.Array,
    sigma: jax.Array,
    sigma_next: jax.Array,
    solver: str,
) -> jax.Array:
    """Equations (1) and (2) for the target: f_ema at the end of one teacher step."""
    x_next = flow.SOLVERS[solver](teacher, x, sigma, sigma_next)
    return jax.lax.stop_gradient(flow.to_x0(x_next, ema(x_next, sigma_next), sigma_next))


def grid_sizes(last: int, doublings: int) -> list[int]:
    """N of the solver grids that a training goes through, each twice the one before, up to `last`.

    Raises:
      ValueError: `last` cannot be halved `doublings` times.
    """
    if last % 2**doublings:
        raise ValueError(
            f"config.grid_doublings is {doublings}; config.grid_steps, {last}, must be divisible "
            f"by {2**doublings}"
        )
    return [last // 2**n for n in range(doublings, -1, -1)]


def loss(
    student: flow.Velocity,
    ema: flow.Velocity,
    teacher: flow.Velocity,
    x0: jax.Array,
    noise: jax.Array,
    index: jax.Array,
    grid: jax.Array,
    solver: str = "euler",
    distance: str = "mse",
) -> jax.Array:
    """Equation (3), one value a frame.

    Args:
      student, ema, teacher: velocity fields bound to the clean history; the teacher is guided.
      x0, noise: `[batch, frames, height, width, channels]`.
      index: k of each frame, int `[batch, frames]` in 0 .. N - 1.
      grid: sigma_0 .. sigma_N, float32 `[N + 1]`.
      solver: 'euler' or 'heun'.
      distance: 'mse' or 'pseudo_huber'.

    Returns:
      float32 `[batch, frames]`.
    """
    sigma, sigma_next = grid[index], grid[index + 1]
    x = flow.interpolate(x0, noise, sigma)
    f_target = target(ema, teacher, x, sigma, sigma_next, solver)
    return DISTANCES[distance](flow.to_x0(x, student(x, sigma), sigma), f_target)


def build(config) -> Stage:
    """Builds stage 2 from a config; `init_from.teacher` is the stage-1 model.

    Raises:
      ValueError: a field is none of its choices, or out of range.
    """
    check_choice("solver", config.solver, flow.SOLVERS)
    check_choice("distance", config.distance, DISTANCES)
    check_choice("frozen_dtype", config.frozen_dtype, FLOATS)
    network = causal_network(config)
    transform = optimizer(config.optimizer, config.steps)
    sizes = grid_sizes(config.grid_steps, config.grid_doublings)
    grids = [np.pad(flow.grid(n, config.shift), (0, sizes[-1] - n)) for n in sizes]
    ends = config.steps * np.arange(1, len(sizes)) // len(sizes)  # of all but the last
    student_sampler(config)  # refuses bad positions now, and not at the first sample

    def init(rng, parents):
        params = inherit(network.init(rng), parents["teacher"])
        return start(params, transform, {"teacher": cast_products(params, config.frozen_dtype)})

    def step(state, batch, rng):
        clean, condition = unpack(batch)
        noise_rng, index_rng = jax.random.split(rng)
        x0 = repeat_draws(clean, config.draws)
        noise = jax.random.normal(noise_rng, x0.shape)
        past = jnp.sum(state.step >= ends, dtype=jnp.int32)
        size, grid = jnp.asarray(sizes)[past], jnp.asarray(grids)[past]
        index = per_chunk(
            lambda shape: jax.random.randint(index_rng, shape, 0, size),
            network.pattern,
            (len(clean), config.draws, clean.shape[1]),
        )
        teacher_params = state.frozen["teacher"]

        def mean_loss(params, inputs):
            clean, condition, x0, noise, index = inputs
            ema = network.teacher_forced(state.ema, clean, condition)
            teacher = network.teacher_forced(teacher_params, clean, condition, config.guidance)
            student = network.teacher_forced(params, clean, condition)
            value = loss(
                student, ema, teacher, x0, noise, index, grid, config.solver, config.distance
            )
            return jnp.mean(value)

        inputs = clean, condition, x0, noise, index
        state, metrics = descend(state, "model", transform, mean_loss, inputs, config.accumulate)
        return advance(state, config), metrics

    # From a bidirectional teacher it can be tried too, as an ablation of the paper does.
    teacher = Parent(("ar_diffusion",), config.model, guided=True)
    return Stage(init, step, {"teacher": teacher})
