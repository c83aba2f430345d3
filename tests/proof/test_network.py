"""The library's DiT, trained through stages 1, 2 and 3 on the linear-Gaussian world.

Stated beforehand: of every frame, the mean within 0.1 standard deviations, the covariance within
10 % (norm of the difference by norm). Of 8192 clips the sampling error is 0.01 and some 2 %.
"""

import dataclasses

import jax
import numpy as np
import pytest

from cfpp.data import linear_gaussian
from tests.proof import networks
from tests.proof.experiments import ACTIONS

WORLD = dataclasses.replace(linear_gaussian.example(), shape=(1, 1, 4))


@pytest.fixture
def optimised():
    """Programs that run for minutes are worth compiling well."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_recipe_matches_the_law_of_every_frame():
    with jax.enable_x64(True):
        law = jax.tree.map(np.asarray, WORLD.law(ACTIONS))
    for name, clips in networks.recipe(WORLD, ACTIONS).items():
        off = networks.deviations(clips, law)
        assert off["mean"].max() < 0.1, f"{name}: means off by {off['mean'].round(3)}"
        assert off["covariance"].max() < 0.1, f"{name}: {off['covariance'].round(3)}"
