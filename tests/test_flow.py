"""The conventions of flow matching, as exact equalities and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cfpp import flow
from tests.tiny import close

SHAPE = (2, 3, 4, 4, 2)
X0, NOISE = jax.random.normal(jax.random.key(0), (2, *SHAPE))
SIGMA = jax.random.uniform(jax.random.key(1), SHAPE[:2], minval=0.1)


def test_both_readings_of_the_output_agree():
    x = flow.interpolate(X0, NOISE, SIGMA)
    v = flow.velocity(X0, NOISE)
    close(flow.to_x0(x, v, SIGMA), X0)
    close(flow.to_velocity(x, X0, SIGMA), v)
    close(flow.to_x0(x, flow.to_velocity(x, X0, SIGMA), SIGMA), X0)


def test_velocity_is_bounded_at_zero_noise():
    v = flow.to_velocity(X0, X0 + 1, jnp.zeros(SHAPE[:2]))
    np.testing.assert_allclose(v, -20.0, rtol=1e-4)


@given(st.integers(1, 100), st.floats(0.5, 10))
def test_grid_falls_from_one_to_zero(steps, shift):
    grid = flow.grid(steps, shift)
    assert grid[0] == 1 and grid[-1] == 0 and np.all(np.diff(grid) < 0) and len(grid) == steps + 1


def test_published_schedule():
    """Wan's shift of 5 moves 1000, 750, 500, 250 to 1000, 937.5, 833.3, 625."""
    levels = flow.schedule([1000, 750, 500, 250], 5.0)
    np.testing.assert_allclose(levels, [1, 0.9375, 0.83333333, 0.625, 0], rtol=1e-6)
    np.testing.assert_array_equal(levels[:-1], flow.grid(48, 5.0)[[0, 12, 24, 36]])


@pytest.mark.parametrize("positions", [[], [500, 1000], [1001], [750, 250], [1000, 500, 500], [0]])
def test_schedule_refuses_what_does_not_fall(positions):
    with pytest.raises(ValueError, match="must fall, from 1000 to above 0"):
        flow.schedule(positions, 5.0)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_the_solvers(solver, order):
    """On dx/dsigma = x cos(3 sigma) the error falls as N^-order."""
    with jax.enable_x64(True):
        velocity = lambda x, sigma: x * jnp.cos(3 * flow.expand(sigma, x))

        def step(x, sigmas):
            a, b = (jnp.full(SHAPE[:2], sigma) for sigma in sigmas)
            return flow.SOLVERS[solver](velocity, x, a, b), None

        def error(steps):
            grid = jnp.linspace(1.0, 0.1, steps + 1)
            x, _ = jax.lax.scan(step, jnp.ones(SHAPE), (grid[:-1], grid[1:]))
            return abs(float(x.ravel()[0]) - np.exp((np.sin(0.3) - np.sin(3.0)) / 3))

        errors = error(400), error(800)
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.02)


def test_heun_is_euler_at_the_last_step():
    velocity = lambda x, sigma: x + flow.expand(sigma, x)
    zero = jnp.zeros(SHAPE[:2])
    euler, heun = (flow.SOLVERS[s](velocity, X0, SIGMA, zero) for s in ("euler", "heun"))
    np.testing.assert_array_equal(euler, heun)


def test_consistency_step_noises_the_prediction_afresh():
    sigma_next = SIGMA / 2
    x = flow.interpolate(X0, NOISE, SIGMA)
    fresh = NOISE[::-1]
    stepped = flow.consistency_step(x, NOISE - X0, SIGMA, sigma_next, fresh)
    close(stepped, flow.interpolate(X0, fresh, sigma_next))


def test_guidance():
    np.testing.assert_array_equal(flow.guide(X0, NOISE, 1.0), NOISE + (X0 - NOISE))
    np.testing.assert_array_equal(flow.guide(X0, NOISE, 0.0), NOISE)
    close(flow.guide(X0, NOISE, 3.0), X0 + 2 * (X0 - NOISE))


def test_matching_loss_vanishes_for_the_truth_and_weighs_low_noise_less():
    truth = lambda x, sigma: NOISE - X0
    np.testing.assert_array_equal(flow.matching_loss(truth, X0, NOISE, SIGMA), 0)
    wrong = lambda x, sigma: NOISE - X0 + 2
    sigma = jnp.array([[0.1, 0.3, 1.0]] * 2)
    loss = flow.matching_loss(wrong, X0, NOISE, sigma, floor=0.3)
    np.testing.assert_allclose(loss, [[4 / 9, 4, 4]] * 2, rtol=1e-4)
