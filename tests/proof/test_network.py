"""The library's DiT, trained through stages 1, 2 and 3 on the linear-Gaussian world.

Stated beforehand: of every frame, the mean within 0.1 standard deviations, the covariance within
10 % (norm of the difference by norm). Sampling 8192 clips adds 0.01 and 2 % or so to these. The
teacher is held to what Euler's method makes of the exact teacher, the students to the truth.
"""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfpp import flow
from cfpp.data import linear_gaussian
from cfpp.stages import ode
from tests.proof import experiments, networks
from tests.proof.experiments import ACTIONS

ROOT = pathlib.Path(__file__).parent.parent.parent
WORLD = linear_gaussian.example(pixels=1)


def test_law_of_a_solver():
    """Against the exact teacher rolled out by Euler's method."""
    with jax.enable_x64(True):
        grid = jnp.asarray(flow.grid(5, 1.0), float)
        size, frames = 4000, 3
        condition = {"actions": jnp.tile(ACTIONS[:frames], (size, 1))}
        clips = jnp.zeros((size, frames, *WORLD.shape))
        noise = jax.random.normal(jax.random.key(0), clips.shape)
        for i in range(frames):
            path = ode.trajectory(WORLD.teacher_forced(clips, condition), noise, grid)
            clips = clips.at[:, i].set(path[-1][:, i])
        law = networks.solved(WORLD, ACTIONS[:frames], grid)
        experiments.has_law(clips, law)


@pytest.mark.slow(250)
def test_recipe_matches_the_law_of_every_frame(tmp_path):
    """In a process whose programs are compiled well, as they run for minutes, and by one thread."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=1"
    environment = os.environ | {"NPROC": "1", "XLA_FLAGS": flags}
    command = [sys.executable, "-m", "tests.proof.networks", tmp_path / "clips.npz"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    with jax.enable_x64(True):
        true = jax.tree.map(np.asarray, WORLD.law(ACTIONS))
        euler = jax.tree.map(np.asarray, networks.solved(WORLD, ACTIONS, flow.grid(48, 1.0)))
    for name, clips in np.load(tmp_path / "clips.npz").items():
        off = networks.deviations(clips, euler if name.startswith("teacher") else true)
        assert off["mean"].max() < 0.1, f"{name}: means off by {off['mean'].round(3)}"
        assert off["covariance"].max() < 0.1, f"{name}: {off['covariance'].round(3)}"
