"""Stage 2': causal ODE distillation, the baseline that consistency distillation replaces.

The guided teacher's probability-flow ODE is solved from pure noise to the end, teacher-forced on
the clean history, and the student regresses from the points of its schedule onto the endpoint:

    (1) x_{sigma_{k+1}} = one Euler or Heun step of the guided teacher from x_{sigma_k}, x_1 = noise
    (2) L = | f_theta(x_sigma, sigma) - x_{sigma_N} |^2   for each sigma of the student's schedule

Each step of training solves the trajectories of its own batch: N teacher steps, where stage 2 takes
one. The points of a trajectory are draws of one clean pass.
"""

import einops
import jax
import jax.numpy as jnp
import numpy as np

from cfpp import flow
from cfpp.models.network import cast_products
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
    repeat_draws,
    start,
    unpack,
)


def trajectory(
    teacher: flow.Velocity, noise: jax.Array, grid: jax.Array, solver: str = "euler"
) -> jax.Array:
    """Equation (1): the whole path of the ODE from `noise`.

    Args:
      teacher: guided velocity field, bound to the clean history.
      noise: `[batch, frames, height, width, channels]`.
      grid: sigma_0 .. sigma_N, float32 `[N + 1]`.
      solver: 'euler' or 'heun'.

    Returns:
      `[N + 1, batch, frames, height, width, channels]`, from the noise to the endpoint.
    """

    def body(x, sigmas):
        sigma, sigma_next = (jnp.broadcast_to(s, noise.shape[:2]) for s in sigmas)
        x = flow.SOLVERS[solver](teacher, x, sigma, sigma_next)
        return x, x

    _, path = jax.lax.scan(body, noise, (grid[:-1], grid[1:]))
    return jnp.concatenate([noise[None], path])


def loss(student: flow.Velocity, x: jax.Array, sigma: jax.Array, endpoint: jax.Array) -> jax.Array:
    """Equation (2), one value a frame, `[batch, frames]`."""
    error = flow.to_x0(x, student(x, sigma), sigma) - jax.lax.stop_gradient(endpoint)
    return jnp.mean(jnp.square(error), axis=(2, 3, 4))


def build(config) -> Stage:
    """Builds stage 2' from a config; `init_from.teacher` is the stage-1 model.

    Raises:
      ValueError: a field is none of its choices, or out of range.
    """
    check_choice("solver", config.solver, flow.SOLVERS)
    check_choice("frozen_dtype", config.frozen_dtype, FLOATS)
    network = causal_network(config)
    transform = optimizer(config.optimizer, config.steps)
    grid = jnp.asarray(flow.grid(config.grid_steps, config.shift))
    wanted = flow.schedule(config.positions, config.shift)[:-1]
    distances = np.abs(np.asarray(grid)[:, None] - wanted)  # [N + 1, points]
    points = np.argmin(distances, 0)
    if distances.min(0).max() > 1e-5:
        raise ValueError(
            f"positions {config.positions} do not all lie on the grid of {config.grid_steps} steps"
        )

    def init(rng, parents):
        params = inherit(network.init(rng), parents["teacher"])
        return start(params, transform, {"teacher": cast_products(params, config.frozen_dtype)})

    def step(state, batch, rng):
        clean, condition = unpack(batch)
        noise = jax.random.normal(rng, clean.shape)
        teacher_params = state.frozen["teacher"]

        def mean_loss(params, inputs):
            clean, condition, noise = inputs
            teacher = network.teacher_forced(teacher_params, clean, condition, config.guidance)
            path = trajectory(teacher, noise, grid, config.solver)
            x = einops.rearrange(path[points], "p b f ... -> b (p f) ...")
            sigma = jnp.broadcast_to(jnp.repeat(grid[points], clean.shape[1]), x.shape[:2])
            endpoint = repeat_draws(path[-1], len(points))
            student = network.teacher_forced(params, clean, condition)
            return jnp.mean(loss(student, x, sigma, endpoint))

        inputs = clean, condition, noise
        state, metrics = descend(state, "model", transform, mean_loss, inputs, config.accumulate)
        return advance(state, config), metrics

    # From a bidirectional teacher it can be tried too, as an ablation of the paper does.
    teacher = Parent(("ar_diffusion",), config.model, guided=True)
    return Stage(init, step, {"teacher": teacher})
