"""Generation against itself: cached, fused, scanned, streamed and replayed are one and the same."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfpp import flow
from cfpp.attention.pattern import CLEAN, Pattern
from cfpp.errors import UserError
from cfpp.rollout.generate import Rollout, consistency, euler, for_stage, gaussian_noise
from cfpp.stages import dmd
from configs import stage3
from tests import tiny

PATTERNS = [
    Pattern(chunk=1),
    Pattern(chunk=3),
    Pattern(chunk=1, window=3),
    Pattern(chunk=1, window=4, sink=1),
    Pattern(chunk=2, window=6, sink=2),
]


def name(pattern):
    return f"chunk{pattern.chunk}-window{pattern.window}-sink{pattern.sink}"


@pytest.mark.parametrize("pattern", PATTERNS, ids=name)
def test_cached_equals_teacher_forced(pattern):
    """Chunk by chunk against the cache is the parallel teacher-forced pass, for every frame."""
    net = tiny.network(pattern)
    params = tiny.params(net)
    frames, chunk = 6, pattern.chunk
    clean, noisy = tiny.latents(net, frames), tiny.latents(net, frames, seed=1)
    sigma = jax.random.uniform(jax.random.key(2), (2, frames // chunk)).repeat(chunk, 1)
    condition = {"actions": tiny.actions(frames)}
    expected = jax.jit(lambda p: net.teacher_forced(p, clean, condition)(noisy, sigma))(params)

    @jax.jit
    def evaluate(cache, x, sigma, frame, copy, actions):
        return net.apply(params, x, sigma, frame, copy, actions, None, cache)

    cache = net.dit.cache(2, pattern.window or frames, pattern.sink)
    one = np.ones(chunk, int)
    for i in range(0, frames, chunk):
        part = np.s_[:, i : i + chunk]
        frame, actions = jnp.arange(i, i + chunk), condition["actions"][part]
        v, _ = evaluate(cache, noisy[part], sigma[part], frame, one, actions)
        tiny.close(v, expected[part])
        zero = 0 * sigma[part]
        _, key_value = evaluate(cache, clean[part], zero, frame, CLEAN * one, actions)
        cache = cache.write(frame, *key_value)


@pytest.mark.parametrize(
    ("pattern", "given", "guidance"),
    [(PATTERNS[0], 0, 2.0), (PATTERNS[1], 1, 1.0), (PATTERNS[3], 5, 1.0), (PATTERNS[4], 3, 2.0)],
)
def test_fused_equals_separate(pattern, given, guidance):
    """The context pass may ride on the next chunk's first step; prefilled frames included."""
    net = tiny.network(pattern)
    params = tiny.params(net)
    context = jax.random.randint(
        jax.random.key(1), (2, given, 8, 12, 2), 0, 256
    ).astype(jnp.uint8)  # fmt: skip
    condition = {"actions": tiny.actions(given + 7)}
    clips = [
        Rollout(net, consistency(2, 3.0, first_steps=3), guidance, fused).clip(
            params, context, condition, jax.random.key(3)
        )
        for fused in (True, False)
    ]
    assert clips[0].shape == (2, 7, 8, 12, 2)
    np.testing.assert_allclose(clips[0].astype(int), clips[1].astype(int), atol=1)
    assert np.unique(clips[0]).size > 50


def test_streamed_equals_scanned():
    """Chunks made one at a time, as a stream makes them, are those of the scanned clip."""
    net = tiny.network(Pattern(chunk=2, window=6))
    params = tiny.params(net)
    rollout = Rollout(net, consistency(2, 3.0))
    actions = tiny.actions(8)
    start = rollout.start(params, tiny.latents(net, 0), {"actions": actions[:, :0]})
    noise = gaussian_noise(jax.random.key(0), start.pending.shape)
    sigmas = jnp.tile(rollout.sampler.sigmas[1], (4, 1))
    unroll = jax.jit(
        lambda p: rollout.unroll(p, start, {"actions": actions}, 4, noise, sigmas, np.full(4, 1))
    )
    next_chunk = jax.jit(lambda p, s, a: rollout.chunk(p, s, a, noise, sigmas[0], 1))
    _, scanned = unroll(params)
    stream = start
    for i in range(4):
        stream, chunk = next_chunk(params, stream, actions[:, 2 * i : 2 * i + 2])
        tiny.close(chunk.x0, scanned.x0[:, 2 * i : 2 * i + 2])


def test_euler_rollout_is_the_solver_on_the_exact_history():
    """With Euler's sampler every frame is the solver's endpoint given the frames before it."""
    net = tiny.network()
    params = tiny.params(net)
    sampler = euler(4, 3.0)
    rollout = Rollout(net, sampler)
    condition = {"actions": tiny.actions(3)}
    start = rollout.start(params, tiny.latents(net, 0), {"actions": condition["actions"][:, :0]}, 3)
    noise = tiny.noise_table(net, 3, 1)
    sigmas = jnp.tile(sampler.sigmas[1], (3, 1))
    _, out = jax.jit(
        lambda p: rollout.unroll(p, start, condition, 3, noise, sigmas, np.full(3, 3))
    )(params)
    x = jnp.concatenate([noise(i, 0) for i in range(3)], 1)
    velocity = jax.jit(net.teacher_forced(params, out.x0, condition))
    for a, b in itertools.pairwise(sampler.sigmas[1, :5]):
        level = lambda s: jnp.full((2, 3), s)
        x = flow.euler_step(x, velocity(x, level(a)), level(a), level(b))
    tiny.close(out.x0, x, 1e-4)


def naive_rollout(net, params, x0, condition, given, noise, sigmas, last, straight_through):
    """Stage 3's rollout written the slow way: sequential, gradients through every last pass."""
    net = dataclasses.replace(net, dit=net.dit.clone(attention="reference"))
    pattern, frames = net.pattern, x0.shape[1]
    chunk = pattern.chunk
    keys, values, frame_of = [], [], []

    def evaluate(x, sigma, frame, copy):
        cache = net.dit.cache(x.shape[0], max(len(frame_of), 1))
        if frame_of:
            cache = cache.replace(
                key=jnp.concatenate(keys, 3),
                value=jnp.concatenate(values, 3),
                frame=jnp.array(frame_of),
            )
        return net.apply(
            params, x, jnp.full(x.shape[:2], sigma), frame, copy, condition["actions"][:, frame],
            None, cache,
        )  # fmt: skip

    def remember(x, frame):
        _, (k, v) = evaluate(x, 0.0, frame, CLEAN * frame)
        keys.append(jax.lax.stop_gradient(k))
        values.append(jax.lax.stop_gradient(v))
        frame_of.extend(frame.tolist())

    if given:
        remember(x0[:, :given], np.arange(given))
    out = [x0[:, :given]]
    for n, i in enumerate(range(given, frames, chunk)):
        frame = np.arange(i, i + chunk)
        x = noise(i, 0)
        for step in range(last[n]):
            v, _ = evaluate(x, sigmas[n][step], frame, np.ones(chunk, int))
            level = jnp.full((2, chunk), sigmas[n][step + 1])
            x = jax.lax.stop_gradient(
                flow.interpolate(x - sigmas[n][step] * v, noise(i, step + 1), level)
            )
        v, (k, value) = evaluate(x, sigmas[n][last[n]], frame, np.ones(chunk, int))
        clean = x - sigmas[n][last[n]] * v
        out.append(clean)
        remember(jax.lax.stop_gradient(clean), frame)
        if straight_through:  # later chunks differentiate through this chunk's noisy keys
            keys[-1] = keys[-1] + k - jax.lax.stop_gradient(k)
            values[-1] = values[-1] + value - jax.lax.stop_gradient(value)
    return jnp.concatenate(out, 1)


@pytest.mark.parametrize("history_gradient", ["none", "straight_through"])
@pytest.mark.parametrize(
    "pattern", [Pattern(), Pattern(chunk=2), Pattern(window=3, sink=1)], ids=name
)
def test_replayed_gradient_equals_the_unrolled_one(pattern, history_gradient):
    net = tiny.network(pattern, layers=1)
    params = tiny.params(net)
    given, frames = (1, 4) if pattern.chunk == 1 else (2, 6)
    x0, weight = tiny.latents(net, frames), tiny.latents(net, frames - given, seed=5)
    condition = {"actions": tiny.actions(frames)}
    chunks = (frames - given) // pattern.chunk
    last = np.array([1, 0, 2][:chunks])
    rollout = Rollout(net, consistency(3, 3.0)).after(given)
    noise = tiny.noise_table(net, frames, 3)
    cache, clip, inputs, sigma = jax.jit(
        lambda p: dmd.self_rollout(rollout, p, x0, condition, given, noise, last)
    )(params)
    net = rollout.network
    replayed = dataclasses.replace(net, dit=net.dit.clone(history_gradient=history_gradient))
    replay = jax.jit(lambda p: dmd.replay(replayed, p, cache, inputs, sigma, condition))
    sigmas = np.tile(rollout.sampler.sigmas[1], (chunks, 1))
    through = history_gradient == "straight_through"
    naive = jax.jit(
        lambda p: naive_rollout(net, p, x0, condition, given, noise, sigmas, last, through)[
            :, given:
        ]
    )
    tiny.close(clip[:, given:], naive(params))
    tiny.close(replay(params), clip[:, given:])
    gradient = lambda f: jax.jit(jax.grad(lambda p: jnp.vdot(f(p), weight)))(params)
    got, expected = gradient(replay), gradient(naive)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale)


def test_students_take_the_positions_they_were_trained_for():
    config = stage3.get_config()
    config.positions, config.first_positions = (1000.0, 250.0), (1000.0, 750.0, 250.0)
    level = lambda positions: flow.schedule(positions, config.shift)
    for steps in (None, 2):
        sampler = for_stage(config, steps).sampler
        np.testing.assert_array_equal(sampler.sigmas[0, :4], level(config.first_positions))
        np.testing.assert_array_equal(sampler.sigmas[1, :3], level(config.positions))
        assert sampler.last.tolist() == [2, 1]
    sampler = for_stage(config, 4, first_steps=1).sampler
    np.testing.assert_array_equal(sampler.sigmas[1, :5], level([1000, 750, 500, 250]))
    assert sampler.last.tolist() == [0, 3]


def test_what_cannot_stream():
    config = stage3.get_config()
    config.stage = "bidirectional"
    with pytest.raises(UserError, match="bidirectional model cannot stream"):
        for_stage(config)
    config.stage = "ar_diffusion"
    with pytest.raises(UserError, match="as many steps for the first chunk"):
        for_stage(config, first_steps=4)
