"""The probe learns to tell actions from real clips, and is not fooled by other ones."""

import jax
import numpy as np
import pytest

from cfpp.data import arena
from cfpp.evaluate import probe


@pytest.fixture
def optimized():
    """Compiles for speed: other tests run their programs once, this one trains."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def test_probe_tells_the_actions(optimized):
    rng = np.random.default_rng(0)
    episodes = [arena.simulate(seed, arena.random_actions(rng, 40)) for seed in range(100)]
    held_out = [arena.simulate(1000 + seed, arena.random_actions(rng, 13)) for seed in range(24)]
    trained = probe.train(episodes, arena.NUM_ACTIONS, steps=100)
    video = np.stack([episode["video"] for episode in held_out])
    actions = np.stack([episode["actions"] for episode in held_out])[:, 1:]
    told = probe.predict_actions(trained, video)
    assert told.shape == actions.shape
    assert (told == actions).mean() > 0.75  # pushed against a wall, actions look alike
    start = np.stack([episode["states"]["agent"][0] for episode in held_out])
    is_free = ((start > 0) & (start < arena.AGENT_HIGH)).all(-1)
    still = np.repeat(video[is_free, :1], 13, axis=1)
    assert (probe.predict_actions(trained, still) == 0).mean() > 0.9  # stay
