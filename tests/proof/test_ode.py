"""Regression onto ODE trajectories: of the causal teacher, and of the bidirectional one.

The losses and trajectories are the library's. For students that are affine in what they see, the
loss is quadratic in their weights, so one Newton step finds its minimiser.
"""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from cfpp import flow
from cfpp.data import linear_gaussian
from cfpp.stages import ode
from tests.proof import experiments
from tests.proof.experiments import ACTIONS, FRAMES

pytestmark = pytest.mark.usefixtures("float64")

WORLD = linear_gaussian.example()
SIZE = WORLD.size
GRID = np.asarray(flow.grid(48, 1.0), np.float64)
CLIPS = 4000


def weights():
    """For each frame, of the noisy frame, of all clean frames before it, and of 1."""
    return [jnp.zeros((SIZE, SIZE * (i + 1) + 1)) for i in range(FRAMES)]


def student(params, clean):
    """A velocity field whose x0 is affine in the noisy frame and all clean frames before it."""
    history = clean.reshape(len(clean), -1)

    def velocity(x, sigma):
        one = jnp.ones((len(x), 1))
        x0 = [
            jnp.concatenate([x[:, i].reshape(len(x), -1), history[:, : i * SIZE], one], 1) @ w.T
            for i, w in enumerate(params)
        ]
        return (x - jnp.stack(x0, 1).reshape(x.shape)) / flow.expand(sigma, x)

    return velocity


def minimise(loss, params):
    """The minimiser of a quadratic loss, by one Newton step."""
    start, unravel = jax.flatten_util.ravel_pytree(params)
    slope = jax.grad(lambda flat: loss(unravel(flat)))
    column = lambda v: jax.jvp(slope, (start,), (v,))[1]
    hessian = jax.jit(lambda: jax.lax.map(column, jnp.eye(len(start))))()
    return unravel(start - jnp.linalg.solve(hessian, slope(start)))


def regress(teacher_of, sigma):
    """Trajectories of a teacher, and the student that fits them best.

    Args:
      teacher_of: `(clean, condition) -> velocity field`.

    Returns:
      The noisy frames at `sigma`, the history, and the loss of each frame `[B, F]`; weights.
    """
    actions = jnp.tile(ACTIONS, (CLIPS, 1))
    clean = WORLD.sample(jax.random.key(0), actions)
    noise = jax.random.normal(jax.random.key(1), clean.shape)
    teacher = teacher_of(clean, {"actions": actions})
    path = jax.jit(lambda: ode.trajectory(teacher, noise, jnp.asarray(GRID), "heun"))()
    return clean, path[np.argmin(np.abs(GRID - sigma))], path[-1]


@pytest.mark.parametrize("sigma", [1.0, 0.5])
def test_bidirectional_teacher_leads_to_the_conditional_expectation(sigma):
    """Its clean frames are the history; the map and the variance that it loses are predicted.

    With p inputs and M clips, the least squares fit differs from the conditional expectation, over
    the same clips, by p / M tr V in the mean square, V the lost covariance: p independent draws of
    N(0, V) / M, of variance 2 p tr V^2 / M^2. The loss is (M - p) / M tr V / D likewise. Both are
    taken within 5 standard deviations, beside the solver's own error, 1e-3 relative at most.
    """
    _, x, x0 = regress(lambda clean, condition: WORLD.bidirectional(condition), sigma)
    level = jnp.full(x.shape[:2], sigma)
    frames_loss = lambda params: jnp.mean(ode.loss(student(params, x0), x, level, x0), 0)
    fitted = minimise(lambda params: jnp.mean(frames_loss(params)), weights())
    loss = frames_loss(fitted)
    got = flow.to_x0(x, student(fitted, x0)(x, level), level).reshape(CLIPS, FRAMES, SIZE)
    law = WORLD.law(ACTIONS)
    for i in range(FRAMES):
        best, lost = linear_gaussian.regression(law, sigma, i, SIZE)
        predicted = best(x[:, i].reshape(CLIPS, -1), x0[:, :i].reshape(CLIPS, -1))
        variance, square = jnp.trace(lost), jnp.trace(lost @ lost)
        inputs = SIZE * (i + 1) + 1
        solver = (1e-3) ** 2 * jnp.mean(jnp.sum(jnp.square(predicted), -1))
        difference = jnp.mean(jnp.sum(jnp.square(got[:, i] - predicted), -1))
        spread = jnp.sqrt(2 * inputs * square)
        assert difference < (inputs * variance + 5 * spread) / CLIPS + solver
        expected = (CLIPS - inputs) / CLIPS * variance / SIZE
        tolerance = 5 * jnp.sqrt(2 * square / CLIPS) / SIZE + solver
        assert loss[i] == pytest.approx(float(expected), abs=float(tolerance))
        if i < FRAMES - 1:
            assert variance > 0.05 * jnp.trace(WORLD.conditional(i, 0).covariance)
        else:  # no frame comes later: own noise and history tell the noise of all frames
            assert variance < 1e-12


def test_causal_teacher_loses_nothing():
    """Given the clean history the path is one to one, so the same fit has no residual."""
    clean, x, x0 = regress(WORLD.teacher_forced, 1.0)
    level = jnp.ones(x.shape[:2])
    loss = lambda params: jnp.mean(ode.loss(student(params, clean), x, level, x0))
    fitted = minimise(loss, weights())
    assert loss(fitted) < 1e-20
    got = flow.to_x0(x, student(fitted, clean)(x, level), level)
    exact = WORLD.flow_map(clean, {"actions": jnp.tile(ACTIONS, (CLIPS, 1))})(x, level)
    assert experiments.relative_error(got, exact) < 1e-3  # the solver's


def test_law_of_a_student_of_the_bidirectional_teacher():
    """Rolled out on its own frames it loses more than a quarter of every frame's variance.

    The first frame, which has no history, keeps in a rollout what it keeps in training: all but the
    lost covariance, 30 %. The others lean on histories that lack as much, so that a quarter is what
    each must be short of.
    """
    law = WORLD.law(ACTIONS)
    fits = [linear_gaussian.regression(law, 1.0, i, SIZE) for i in range(FRAMES)]
    got = linear_gaussian.rollout([[fit] for fit, _ in fits], [1.0])
    variance = lambda law: jnp.diag(law.covariance).reshape(FRAMES, SIZE).sum(1)
    ratio = variance(got) / variance(law)
    assert ratio[0] == pytest.approx(1 - float(jnp.trace(fits[0][1]) / variance(law)[0]), rel=1e-9)
    assert ratio.max() < 0.75
    np.testing.assert_allclose(got.mean, law.mean, atol=1e-12)


def test_same_map_as_consistency_which_needs_fewer_teacher_evaluations():
    """The stage-2 claim, counted: to 3 % at both levels of a 2-step student, same optimiser.

    One solver step a draw against one a level. The factor of 4 is the paper's; at which rates it
    holds is in docs/proof.md.
    """
    learner = experiments.separate(WORLD, np.asarray(flow.grid(24, 1.0), np.float64))
    curves = experiments.race(learner, rate=0.003, steps=1200)
    assert curves["ode"][1][-1] < 0.01
    assert experiments.spent(curves["ode"], 0.03) > 4 * experiments.spent(curves["cd"], 0.03) > 0
