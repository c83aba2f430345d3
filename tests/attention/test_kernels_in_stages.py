"""What the kernels are for: training stages, and rollouts in them, come out as by the reference."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfpp import stages
from cfpp.attention.pattern import Pattern
from cfpp.rollout.generate import Rollout
from cfpp.rollout.sampler import consistency
from cfpp.stages import dmd
from tests import test_stages, tiny


def test_a_teacher_forced_step():
    """Losses and gradients within a few roundings: sums in another order."""
    config = test_stages.tiny_config("ar_diffusion")
    state = nn.meta.unbox(jax.jit(stages.build(config).init)(jax.random.key(0), {}))

    def step(attention):
        config.model.attention = attention
        program = jax.jit(stages.build(config).step)
        return jax.device_get(program(state, test_stages.batch(config), jax.random.key(1))[1])

    expected, ours = step("reference"), step("pallas_tpu")
    for key in expected:
        assert ours[key] == pytest.approx(expected[key], rel=2e-5), key


def replayed(attention: str):
    """A self-rollout of stage 3, and the gradient of all its chunks at once against its cache."""
    net = tiny.network(Pattern(window=4, sink=1), attention=attention).after(1)
    rollout, noise = Rollout(net, consistency(2, 3.0)), tiny.noise_table(net, 4, 2)
    clip, weight = tiny.latents(net, 4), tiny.latents(net, 3, seed=1)
    condition, last = {"actions": tiny.actions(4)}, np.array([1, 0, 1])

    @jax.jit
    def run(params):
        cache, x0, x, sigma = dmd.self_rollout(rollout, params, clip, condition, 1, noise, last)
        replay = lambda p: dmd.replay(net, p, cache, x, sigma, condition)
        return x0, jax.grad(lambda p: jnp.vdot(replay(p), weight))(params)

    return run(tiny.params(net))


def test_a_replayed_rollout_and_its_gradient():
    ours, expected = replayed("pallas_tpu"), replayed("reference")
    jax.tree.map(lambda a, b: tiny.close(a, b, 2e-5), ours, expected)


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
        return rollout.unroll(params, stream, later, noise, *levels)[1].x0

    return run(tiny.params(net))


def test_a_rollout_past_the_rings_first_round():
    expected = rolled_out("reference")
    for name in ("pallas_tpu", "pallas_gpu"):
        tiny.close(rolled_out(name), expected)
