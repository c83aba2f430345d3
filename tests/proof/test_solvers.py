"""The solvers against the exact flow map."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfpp import flow
from cfpp.data import linear_gaussian
from cfpp.stages import ode
from tests.proof import experiments

pytestmark = pytest.mark.usefixtures("float64")

WORLD = linear_gaussian.example()
STEPS = np.array([64, 128, 256])


@pytest.mark.parametrize("shift", [1.0, 4.0])
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_order(solver, order, shift):
    """The error of the whole trajectory falls as N^-order.

    The next term of the error is of relative size c / N. By the coarsest grid's own error (1 to 4 %
    for Euler, to which c / N is akin) it bends the fitted slope by at most 0.05.
    """
    x0, condition = experiments.batch(WORLD, jax.random.key(0), 64)
    noise = jax.random.normal(jax.random.key(1), x0.shape)
    teacher = WORLD.teacher_forced(x0, condition)
    exact = WORLD.flow_map(x0, condition)(noise, jnp.ones(noise.shape[:2]))
    solve = jax.jit(lambda grid: ode.trajectory(teacher, noise, grid, solver)[-1])
    errors = [
        experiments.relative_error(solve(jnp.asarray(flow.grid(n, shift), float)), exact)
        for n in STEPS
    ]
    slope = np.polyfit(np.log(STEPS), np.log(errors), 1)[0]
    assert -slope == pytest.approx(order, abs=0.05)
