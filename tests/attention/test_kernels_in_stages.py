"""What the kernels are for: training stages, and rollouts in them, come out as by the reference."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfpp import stages
from cfpp.attention.pattern import Pattern
from cfpp.rollout.generate import Rollout, consistency
from tests import test_stages, tiny


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


def rolled_out(attention: str, frames: int = 7) -> jax.Array:
    """Frames after one that is given, of a window of 4 with a sink: 3 slots come round twice."""
    net = tiny.network(Pattern(window=4, sink=1), attention=attention)
    rollout = Rollout(net, consistency(2, 3.0))
    noise, later = tiny.noise_table(net, frames + 1, 2), {"actions": tiny.actions(frames)}
    rows = np.ones(frames, int)
    levels = jnp.asarray(rollout.sampler.sigmas)[rows], jnp.asarray(rollout.sampler.last)[rows]

    @jax.jit
    def run(params):
        stream = rollout.start(params, tiny.latents(net, 1), {"actions": tiny.actions(1)})
        return rollout.unroll(params, stream, later, frames, noise, *levels)[1].x0

    return run(tiny.params(net))


def test_a_rollout_past_the_rings_first_round():
    expected = rolled_out("reference")
    for name in ("pallas_tpu", "pallas_gpu"):
        tiny.close(rolled_out(name), expected)
