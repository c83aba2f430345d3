"""What the kernels are for: training stages, and rollouts in them, come out as by the reference."""

import flax.linen as nn
import jax
import pytest

from cfpp import stages
from tests import test_stages


@pytest.mark.parametrize("name", ["ar_diffusion", "dmd"])
def test_a_step_by_the_tpu_kernels(name):
    """Losses and gradients, teacher-forced and of a self-rollout, within a few roundings.

    Sums in another order differ by a few times 6e-8 of their terms, and stage 3's gradient is a
    difference of two predictions, some tens of times smaller than they are.
    """
    found = []
    for attention in ("reference", "pallas_tpu"):
        config = test_stages.tiny_config(name)
        config.model.attention = attention
        stage = stages.build(config)
        parents = test_stages.parents(config, stage)
        state = nn.meta.unbox(jax.jit(stage.init)(jax.random.key(0), parents))
        _, metrics = jax.jit(stage.step)(state, test_stages.batch(config), jax.random.key(1))
        found.append({key: float(value) for key, value in metrics.items()})
    expected, ours = found
    for key in expected:
        assert ours[key] == pytest.approx(expected[key], rel=2e-5), key
