"""The sampler that suits a stage, and what it computes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfpp import flow
from cfpp.attention.pattern import Pattern
from cfpp.errors import UserError
from cfpp.models.network import Network
from cfpp.rollout import generate
from cfpp.rollout.generate import Rollout
from cfpp.rollout.sampler import euler
from configs import stage0, stage1, stage2, stage3
from tests import tiny


def test_euler_rollout_is_the_solver_on_the_exact_history():
    """With Euler's sampler, guided, every frame is the solver's endpoint given those before it."""
    net = tiny.network()
    params = tiny.params(net)
    sampler = euler(4, 3.0)
    rollout = Rollout(net, sampler, guidance=2.0)
    condition = {"actions": tiny.actions(3)}
    start = rollout.start(params, tiny.latents(net, 0), {"actions": condition["actions"][:, :0]}, 3)
    noise = tiny.noise_table(net, 3, 1)
    sigmas = jnp.tile(sampler.sigmas[1], (3, 1))
    run = jax.jit(lambda p: rollout.unroll(p, start, condition, noise, sigmas, np.full(3, 3)))
    _, out = run(params)
    x = noise(np.arange(3), 0)
    velocity = jax.jit(net.teacher_forced(params, out.x0, condition, guidance=2.0))
    for a, b in itertools.pairwise(sampler.sigmas[1, :5]):
        level = lambda s: jnp.full((2, 3), s)
        x = flow.euler_step(x, velocity(x, level(a)), level(a), level(b))
    tiny.close(out.x0, x, 1e-4)


def test_first_chunk_of_another_length():
    """A stream goes on under another pattern: 3 frames at once, then one by one."""
    net = tiny.network(Pattern(chunk=1, first_chunk=3))
    params, sampler = tiny.params(net), euler(1, 3.0)
    long = Rollout(tiny.network(Pattern(chunk=3)), sampler, fused=False)
    short = Rollout(net, sampler, fused=False)
    actions, noise = tiny.actions(5), tiny.latents(net, 5, seed=1)

    @jax.jit
    def generate(params):
        stream = long.start(params, tiny.latents(net, 0), {"actions": actions[:, :0]}, 5)
        parts = []
        for rollout, i in ((long, 0), (short, 3), (short, 4)):
            part = np.s_[:, i : i + rollout.network.pattern.chunk]
            levels = jnp.asarray(sampler.sigmas[1])
            stream, chunk = rollout.next_chunk(
                params, stream, actions[part], lambda frames, _: noise[:, frames], levels, 0
            )
            parts.append(chunk.x0)
        return jnp.concatenate(parts, 1)

    clip = generate(params)
    velocity = jax.jit(net.teacher_forced(params, clip, {"actions": actions}))
    tiny.close(noise - velocity(noise, jnp.ones((2, 5))), clip, 1e-4)


@pytest.mark.parametrize(
    ("pattern", "given", "slots", "chunks", "message"),
    [
        (Pattern(chunk=3), 0, 2, 1, "has 2 slots; a clip of 3 frames needs 3"),
        (Pattern(), 0, 3, 4, "has 3 slots; a clip of 4 frames needs 4"),
        (Pattern(), 2, 4, 3, "has 4 slots; a clip of 5 frames needs 5"),
        (Pattern(), 5, 3, 1, "has 3 slots; a clip of 6 frames needs 6"),
        (Pattern(window=4), 0, 0, 1, "has 0 slots; a clip of 1 frames needs 1"),
        (Pattern(window=4), 0, 3, 5, "has 3 slots; a clip of 5 frames needs 4"),
        (Pattern(window=4, sink=2), 0, 2, 1, "has 2 slots; a clip of 3 frames needs 3"),
    ],
)
def test_a_cache_too_short_for_the_schedule(pattern, given, slots, chunks, message):
    """Told when a program is traced, where as many slots as it names will do."""
    net = tiny.network(pattern)
    rollout, noise = Rollout(net, euler(1, 3.0)), tiny.noise_table(net, 8, 1)
    actions = tiny.actions(given + chunks * pattern.chunk)

    def run(params, slots):
        first, later = ({"actions": x} for x in (actions[:, :given], actions[:, given:]))
        stream = rollout.start(params, tiny.latents(net, given), first, slots)
        sigmas, last = jnp.ones((chunks, 2)), np.zeros(chunks, int)
        return rollout.unroll(params, stream, later, noise, sigmas, last)[1]

    params = tiny.params(net)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda p: run(p, slots), params)
    needed = int(message.rpartition(" ")[2])
    assert jax.eval_shape(lambda p: run(p, needed), params).x0.shape[1] == actions.shape[1] - given


def test_without_a_window_a_stream_is_not_unrolled_in_another_program():
    """Its frame is not known there: the cache might be too short, and nobody would see it."""
    net = tiny.network(Pattern())
    rollout, noise, params = (
        Rollout(net, euler(1, 3.0)),
        tiny.noise_table(net, 8, 1),
        tiny.params(net),
    )
    start = jax.jit(
        lambda p: rollout.start(p, tiny.latents(net, 0), {"actions": tiny.actions(0)}, 4)
    )
    stream, condition = jax.eval_shape(start, params), {"actions": tiny.actions(3)}
    unroll = lambda p, s: rollout.unroll(p, s, condition, noise, jnp.ones((3, 2)), np.zeros(3, int))
    with pytest.raises(ValueError, match="without a window, a clip is unrolled in the program"):
        jax.eval_shape(unroll, params, stream)


def test_frames_of_another_size():
    net = tiny.network()
    rollout = Rollout(net, euler(1, 3.0))
    for height, width in ((12, 8), (9, 12)):
        frames = jnp.zeros((1, 1, height, width, 2))
        with pytest.raises(ValueError, match=rf"\(8, 12, 2\), got \({height}, {width}, 2\)"):
            rollout.start(tiny.params(net), frames, {"actions": tiny.actions(1, 1)}, 2)


def for_stage(config, *arguments, **named):
    network = Network.create(config.model, config.pattern)
    return generate.for_stage(network, config, *arguments, **named)


def test_students_take_the_positions_they_were_trained_for():
    config = stage3.get_config()
    assert config.positions == stage2.get_config().positions
    config.positions, config.first_positions = (1000.0, 250.0), (1000.0, 750.0, 250.0)
    level = lambda positions: flow.schedule(positions, config.shift)
    for steps in (None, 2):
        sampler = for_stage(config, steps).sampler
        np.testing.assert_array_equal(sampler.sigmas[0, :4], level(config.first_positions))
        np.testing.assert_array_equal(sampler.sigmas[1, :3], level(config.positions))
        assert sampler.last.tolist() == [2, 1]
    for first_steps, positions in ((2, config.positions), (3, config.first_positions)):
        first = for_stage(config, 4, first_steps).sampler.sigmas[0, : first_steps + 1]
        np.testing.assert_array_equal(first, level(positions))
    sampler = for_stage(config, 3).sampler
    np.testing.assert_array_equal(sampler.sigmas[:, :4], [level(config.first_positions)] * 2)
    config.positions = (1000.0, 500.0, 250.0)  # as many, and others
    sampler = for_stage(config).sampler
    np.testing.assert_array_equal(sampler.sigmas[0, :4], level(config.first_positions))
    np.testing.assert_array_equal(sampler.sigmas[1, :4], level(config.positions))
    sampler = for_stage(config, 4, first_steps=1).sampler
    np.testing.assert_array_equal(sampler.sigmas[1, :5], level([1000, 750, 500, 250]))
    assert sampler.last.tolist() == [0, 3]


def test_what_cannot_stream():
    config = stage3.get_config()
    with pytest.raises(UserError, match="in a student guidance is distilled"):
        for_stage(config, guidance=2.0)
    for name in ("steps", "first_steps"):
        with pytest.raises(UserError, match=f"^{name} is 0; it must be at least 1"):
            for_stage(config, **{name: 0})
    with pytest.raises(UserError, match="bidirectional model cannot stream"):
        for_stage(stage0.get_config())
    with pytest.raises(UserError, match="as many steps for the first chunk"):
        for_stage(stage1.get_config(), first_steps=4)


def test_a_teachers_guidance_is_its_configs_or_as_asked():
    config = stage1.get_config()
    assert [for_stage(config, guidance=w).guidance for w in (None, 1.0, 3.0)] == [None, None, 3.0]
    config.guidance = 2.0
    assert [for_stage(config, guidance=w).guidance for w in (None, 1.0, 3.0)] == [2.0, None, 3.0]
