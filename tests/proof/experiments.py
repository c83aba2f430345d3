"""Distillation in the linear-Gaussian world: exact teachers, small students, the library's losses.

`tests/proof` asserts what comes out; `python -m benchmarks.proof` draws it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cfpp import flow
from cfpp.data.linear_gaussian import World
from cfpp.stages import consistency, ode

FRAMES = 4
ACTIONS = np.array([0, 1, 2, 1])  # where one clip's actions are needed


class Student(NamedTuple):
    """A velocity field that starts from the teacher's and learns an affine correction to it.

        v(x, sigma_k | h, u) = v_teacher + W_k [x, h, onehot(u)],   W_k = sum_j features[k, j] W^j

    h is the frame before. The first frame has weights of its own. On the levels of its grid it can
    be any map that is affine in (x, h, u), where its features are: the identity gives every level
    weights of its own, polynomials share them as a network would.
    """

    world: World
    grid: np.ndarray  # [N + 1]
    features: np.ndarray  # [N + 1, J]

    def init(self, rng: jax.Array, scale: float = 0.0) -> jax.Array:
        """Weights `[2, J, D, inputs]`: of the first frame, and of the others."""
        inputs = 2 * self.world.size + len(self.world.pushes)
        shape = (2, self.features.shape[1], self.world.size, inputs)
        return scale * jax.random.normal(rng, shape)

    def teacher_forced(self, params, clean: jax.Array, condition) -> flow.Velocity:
        """As `cfpp.models.network.Network.teacher_forced`, and any number of draws."""
        teacher = self.world.teacher_forced(clean, condition)
        batch, frames = clean.shape[:2]
        flat = clean.reshape(batch, frames, -1)
        before = jnp.pad(flat[:, :-1], ((0, 0), (1, 0), (0, 0)))
        action = jax.nn.one_hot(condition["actions"], len(self.world.pushes))
        bound = jnp.concatenate([before, action], -1)
        weights = jnp.einsum("kj,tjdz->ktdz", self.features, params)

        def velocity(x, sigma):
            draws = x.shape[1] // frames
            inputs = jnp.concatenate(
                [x.reshape(*x.shape[:2], -1), jnp.tile(bound, (1, draws, 1))], -1
            )
            level = jnp.argmin(jnp.abs(sigma[..., None] - self.grid), -1)
            first = jnp.minimum(jnp.arange(x.shape[1]) % frames, 1)
            correction = jnp.einsum("bfdz,bfz->bfd", weights[level, first], inputs)
            return teacher(x, sigma) + correction.reshape(x.shape)

        return velocity


def separate(world: World, grid: np.ndarray) -> Student:
    """A student with weights of their own at every level."""
    return Student(world, grid, np.eye(len(grid)))


def shared(world: World, grid: np.ndarray, terms: int) -> Student:
    """A student whose weights are polynomials of the grid's position, `terms` coefficients each."""
    position = np.linspace(-1, 1, len(grid))
    return Student(world, grid, np.polynomial.chebyshev.chebvander(position, terms - 1))


def batch(world: World, rng: jax.Array, size: int, frames: int = FRAMES):
    """Clips of the world and their random actions."""
    action_rng, clip_rng = jax.random.split(rng)
    actions = jax.random.randint(action_rng, (size, frames), 0, len(world.pushes))
    return world.sample(clip_rng, actions), {"actions": actions}


def consistency_loss(student, grid, solver, levels, draws):
    """Stage 2's loss, indices drawn from 0 .. levels - 1: `(params, ema, rng, size) -> scalar`."""

    def loss(params, ema, rng, size):
        data_rng, noise_rng, index_rng = jax.random.split(rng, 3)
        clean, condition = batch(student.world, data_rng, size)
        x0 = jnp.tile(clean, (1, draws, 1, 1, 1))
        noise = jax.random.normal(noise_rng, x0.shape)
        index = jax.random.randint(index_rng, x0.shape[:2], 0, levels)
        value = consistency.loss(
            student.teacher_forced(params, clean, condition),
            student.teacher_forced(ema, clean, condition),
            student.world.teacher_forced(clean, condition),
            x0, noise, index, jnp.asarray(grid), solver,
        )  # fmt: skip
        return jnp.mean(value)

    return loss


def ode_loss(student, grid, solver, points):
    """Stage 2''s loss on its trajectories' `points`: `(params, ema, rng, size) -> scalar`."""

    def loss(params, ema, rng, size):
        del ema
        data_rng, noise_rng = jax.random.split(rng)
        clean, condition = batch(student.world, data_rng, size)
        noise = jax.random.normal(noise_rng, clean.shape)
        teacher = student.world.teacher_forced(clean, condition)
        path = ode.trajectory(teacher, noise, jnp.asarray(grid), solver)
        x = jnp.concatenate(list(path[points]), 1)
        sigma = jnp.broadcast_to(jnp.repeat(grid[points], clean.shape[1]), x.shape[:2])
        endpoint = jnp.tile(path[-1], (1, len(points), 1, 1, 1))
        return jnp.mean(
            ode.loss(student.teacher_forced(params, clean, condition), x, sigma, endpoint)
        )

    return loss


def train(loss, params, measure, *, steps, every, size, rate, decay=0.9, seed=0, final=0.01):
    """Adam on a loss; `measure(params)` before the first and after every `every` steps.

    The rate falls by a cosine to a hundredth.
    """
    transform = optax.adam(optax.cosine_decay_schedule(rate, steps, final))

    def step(carry, rng):
        params, ema, state = carry
        gradient = jax.grad(loss)(params, ema, rng, size)
        updates, state = transform.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        return (params, optax.incremental_update(params, ema, 1 - decay), state), None

    @jax.jit
    def stretch(carry, rng):
        carry, _ = jax.lax.scan(step, carry, jax.random.split(rng, every))
        return carry, measure(carry[0])

    carry = params, params, transform.init(params)
    measured = [measure(params)]
    for rng in jax.random.split(jax.random.key(seed), steps // every):
        carry, value = stretch(carry, rng)
        measured.append(value)
    return carry[0], np.stack(measured)


def race(student, rate, *, draws=1, size=64, steps=1600, every=20, seed=0):
    """Causal CD against causal ODE with one constant rate and the same clips a step.

    Returns:
      For each, teacher steps taken `[measurements]` in units of a batch of clips, and the largest
      error of the map at the two levels of a 2-step student, relative. The loss of CD takes `draws`
      of each clip; its teacher takes one solver step a draw, that of ODE N a trajectory.
    """
    levels = len(student.grid) - 1
    points = np.array([0, levels // 2])
    measure = map_error(student, student.grid[points])
    runs = {
        "cd": (draws, consistency_loss(student, student.grid, "heun", levels, draws)),
        "ode": (levels, ode_loss(student, student.grid, "heun", points)),
    }
    curves = {}
    for name, (cost, loss) in runs.items():
        start = student.init(jax.random.key(seed))
        _, errors = train(
            loss, start, measure, steps=steps, every=every, size=size, rate=rate, final=1.0
        )
        curves[name] = cost * every * np.arange(len(errors)), errors.max(1)
    return curves


def spent(curve, target: float) -> int | None:
    """The teacher steps after which the error of a `race` is first below `target`."""
    reached = np.flatnonzero(curve[1] < target)
    return int(curve[0][reached[0]]) if len(reached) else None


def map_error(student: Student, levels: np.ndarray, size: int = 1024, seed: int = 100):
    """`params -> [levels]`: error of the student's map against the exact one, relative, rms."""
    clean, condition = batch(student.world, jax.random.key(seed), size)
    noise = jax.random.normal(jax.random.key(seed + 1), clean.shape)
    exact = student.world.flow_map(clean, condition)

    def at_level(params, sigma):
        sigma = jnp.full(clean.shape[:2], sigma)
        x = flow.interpolate(clean, noise, sigma)
        velocity = student.teacher_forced(params, clean, condition)
        return relative_error(flow.to_x0(x, velocity(x, sigma), sigma), exact(x, sigma))

    return lambda params: jax.lax.map(lambda s: at_level(params, s), jnp.asarray(levels))


def relative_error(x: jax.Array, exact: jax.Array) -> jax.Array:
    """The root mean square of the difference over that of the exact values."""
    return jnp.sqrt(jnp.mean(jnp.square(x - exact)) / jnp.mean(jnp.square(exact)))


def within_standard_errors(samples, expected, errors=5.0):
    """The mean of `samples` over their first axis is `expected`."""
    mean, spread = np.mean(samples, 0), np.std(samples, 0)
    deviation = np.abs(mean - expected) / (spread / np.sqrt(len(samples)) + 1e-12)
    assert deviation.max() < errors, f"{deviation.max():.1f} standard errors"


def has_law(x, law):
    """Samples `[M, ...]` have the mean and the covariance of a Gaussian."""
    x = np.asarray(x).reshape(len(x), -1)
    within_standard_errors(x, law.mean)
    centred = x - law.mean
    within_standard_errors(centred[:, :, None] * centred[:, None], law.covariance)
