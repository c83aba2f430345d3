"""The world's closed forms against brute force: numerical integration and Monte Carlo.

Monte Carlo figures lie within 5 of their own standard errors: one test in a million fails by chance
for each figure, and the seeds are fixed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

from cfpp import flow
from cfpp.data import linear_gaussian
from cfpp.data.linear_gaussian import Affine, Gaussian
from tests.proof import experiments
from tests.proof.experiments import ACTIONS, FRAMES, has_law, within_standard_errors

pytestmark = pytest.mark.usefixtures("float64")

WORLD = linear_gaussian.example()
SIZE = WORLD.size


def clips(batch, seed=0):
    actions = jnp.tile(ACTIONS, (batch, 1))
    return WORLD.sample(jax.random.key(seed), actions), {"actions": actions}


@pytest.mark.parametrize("kind", ["teacher_forced", "bidirectional"])
def test_velocity_is_the_conditional_expectation(kind):
    """noise - x0 - v(x_sigma) is orthogonal to 1, to x_sigma and to the frame before."""
    x0, condition = clips(20000)
    noise = jax.random.normal(jax.random.key(1), x0.shape)
    levels = jnp.array([1.0, 0.7, 0.3, 0.05])  # of each frame, or of each quarter of the clips
    if kind == "teacher_forced":
        sigma, field = jnp.tile(levels, (len(x0), 1)), WORLD.teacher_forced(x0, condition)
    else:
        sigma = jnp.repeat(levels, len(x0) // 4)[:, None].repeat(FRAMES, 1)
        field = WORLD.bidirectional(condition)
    x = flow.interpolate(x0, noise, sigma)
    error = (flow.velocity(x0, noise) - field(x, sigma)).reshape(len(x0), FRAMES, SIZE)
    flat = lambda y: y.reshape(len(x0), FRAMES, SIZE)
    seen = jnp.concatenate([flat(x), jnp.ones((len(x0), FRAMES, 1))], -1)
    if kind == "teacher_forced":
        before = jnp.pad(flat(x0)[:, :-1], ((0, 0), (1, 0), (0, 0)))
        within_standard_errors(
            error[..., None] * jnp.concatenate([seen, before], -1)[:, :, None], 0
        )
        return
    products = error.reshape(len(x0), -1)[:, :, None] * seen.reshape(len(x0), -1)[:, None]
    for quarter in jnp.split(products, 4):
        within_standard_errors(quarter, 0)


@pytest.mark.parametrize("kind", ["teacher_forced", "bidirectional"])
@pytest.mark.parametrize("sigma", [1.0, 0.6, 0.1])
def test_flow_map_is_the_end_of_the_ode(kind, sigma):
    """Against an eighth-order integrator at relative tolerance 1e-10."""
    x0, condition = clips(2)
    if kind == "teacher_forced":
        field, exact = WORLD.teacher_forced(x0, condition), WORLD.flow_map(x0, condition)
    else:
        field, exact = WORLD.bidirectional(condition), WORLD.bidirectional_flow_map(condition)
    field = jax.jit(field)
    level = lambda s: jnp.full(x0.shape[:2], s)
    x = jax.random.normal(jax.random.key(1), x0.shape)
    slope = lambda s, y: np.asarray(field(y.reshape(x.shape), level(s))).ravel()
    ode = scipy.integrate.solve_ivp(
        slope, (sigma, 0.0), np.asarray(x).ravel(), "DOP853", rtol=1e-10, atol=1e-12
    )
    np.testing.assert_allclose(
        exact(x, level(sigma)), ode.y[:, -1].reshape(x.shape), rtol=1e-8, atol=1e-8
    )


def test_flow_between_levels_composes():
    law = WORLD.law(ACTIONS)
    x = jax.random.normal(jax.random.key(0), (3, FRAMES * SIZE))
    half = law.flow(x, jnp.full(3, 0.9), jnp.full(3, 0.4))
    np.testing.assert_allclose(law.flow(half, jnp.full(3, 0.4)), law.flow(x, jnp.full(3, 0.9)))


def test_law_is_that_of_samples():
    has_law(clips(20000)[0], WORLD.law(ACTIONS))


def test_law_given_the_past_is_the_process():
    law, x = WORLD.law(ACTIONS), np.asarray(clips(1)[0]).ravel()
    for frame in range(1, FRAMES):
        known, until = frame * SIZE, (frame + 1) * SIZE
        part = Gaussian(law.mean[:until], law.covariance[:until, :until]).given(known, x[:known])
        mean = WORLD.transition @ x[known - SIZE : known] + WORLD.pushes[ACTIONS[frame]]
        np.testing.assert_allclose(part.mean, mean, atol=1e-12)
        np.testing.assert_allclose(part.covariance, WORLD.covariance, atol=1e-12)


def test_affine_maps_are_the_flow_map():
    x0, condition = clips(2)
    x = jax.random.normal(jax.random.key(1), x0.shape)
    for sigma in (1.0, 0.4):
        exact = WORLD.flow_map(x0, condition)(x, jnp.full(x0.shape[:2], sigma))
        for frame, action in enumerate(ACTIONS):
            affine = WORLD.affine(sigma, frame, action)
            got = affine(x[:, frame].reshape(2, -1), x0[:, :frame].reshape(2, -1))
            np.testing.assert_allclose(got, exact[:, frame].reshape(2, -1), atol=1e-12)


@pytest.mark.parametrize("positions", [(1000,), (1000, 500), (1000, 750, 500, 250)])
def test_exact_map_samples_the_exact_law(positions):
    """In any number of steps: the map's output has the right law at every level."""
    sigmas = flow.schedule(positions, 4.0)[:-1].astype(np.float64)
    maps = [[WORLD.affine(s, i, u) for s in sigmas] for i, u in enumerate(ACTIONS)]
    got, law = linear_gaussian.rollout(maps, sigmas), WORLD.law(ACTIONS)
    np.testing.assert_allclose(got.mean, law.mean, atol=1e-12)
    np.testing.assert_allclose(got.covariance, law.covariance, atol=1e-12)


def test_law_of_a_rollout():
    """Maps of random numbers, rolled out by the library's consistency steps."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: 0.4 * rng.standard_normal(shape)
    sigmas = (1.0, 0.8, 0.3)
    maps = [
        [Affine(draw(SIZE, SIZE), draw(SIZE, i * SIZE), draw(SIZE)) for _ in sigmas]
        for i in range(3)
    ]
    batch, keys = 20000, iter(jax.random.split(jax.random.key(0), 12))
    history = jnp.zeros((batch, 0))
    for frame_maps in maps:
        x = jax.random.normal(next(keys), (batch, 1, SIZE))
        for fn, sigma, after in zip(frame_maps, sigmas, (*sigmas[1:], 0.0), strict=True):
            v = (x - fn(x, history[:, None])) / sigma
            x = flow.consistency_step(x, v, sigma, after, jax.random.normal(next(keys), x.shape))
        history = jnp.concatenate([history, x[:, 0]], 1)
    has_law(history, linear_gaussian.rollout(maps, sigmas))


def test_divergence():
    """Against the mean of the difference of log densities, over samples."""
    law, other = WORLD.law(ACTIONS[:2]), WORLD.law(ACTIONS[1:3]).noised(0.2)
    x = clips(20000)[0][:, :2].reshape(20000, -1)
    density = jax.scipy.stats.multivariate_normal.logpdf
    difference = density(x, law.mean, law.covariance) - density(x, other.mean, other.covariance)
    within_standard_errors(np.asarray(difference)[:, None], law.divergence(other))
    np.testing.assert_allclose(law.divergence(law), 0, atol=1e-12)


def test_several_draws_share_the_history():
    """Fields over several draws of a clip are those of each draw."""
    x0, condition = clips(2)
    x = jax.random.normal(jax.random.key(1), (2, 3 * FRAMES, *WORLD.shape))
    sigma = jax.random.uniform(jax.random.key(2), x.shape[:2])
    student = experiments.separate(WORLD, np.linspace(1, 0, 5))
    params = student.init(jax.random.key(3), 1.0)
    for field in (
        WORLD.teacher_forced(x0, condition),
        WORLD.flow_map(x0, condition),
        student.teacher_forced(params, x0, condition),
    ):
        together = field(x, sigma)
        for draw in range(3):
            part = np.s_[:, draw * FRAMES : (draw + 1) * FRAMES]
            np.testing.assert_allclose(field(x[part], sigma[part]), together[part], atol=1e-12)
