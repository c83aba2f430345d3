"""The pipeline against itself: exact equalities, over patterns of attention of all kinds.

Each function is computed in two ways that share no more than the network. Float32 rounds each
operation by 6e-8 of its value; through a network of two layers that is below 1e-5 of the largest
output. Rollouts, of up to a dozen passes on one another's outputs, and gradients are computed in
float64, which rounds by 1e-16: below 1e-13 through a network, and 1e-9 of the largest number in a
tensor is out of reach for all rounding, and next to nothing for a mistake.
"""

import contextlib
import functools
import itertools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from cfpp import flow
from cfpp.attention.pattern import CLEAN, Pattern
from cfpp.rollout.generate import Rollout
from cfpp.rollout.sampler import consistency, euler
from cfpp.stages import consistency as stage2
from cfpp.stages import dmd, ode
from tests import tiny


def few(examples):
    """Each example compiles programs of its own; the same ones every time."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],  # no shrinking, which would compile for hours
    )


@st.composite
def patterns(draw):
    """Patterns whose windows are tight, so that short clips leave them."""
    chunk, sink = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 0, 2]))
    first_chunk = draw(st.sampled_from([None, 1, 2, 3]))
    spare = draw(st.sampled_from([1, 0, 2, None]))
    window = None if spare is None else sink + max(chunk, first_chunk or 0) + spare
    return Pattern(chunk, first_chunk, window, sink if window else 0)


@contextlib.contextmanager
def double():
    """Float64 everywhere, also where the library takes float32 whatever the model's dtype."""
    with jax.enable_x64(True), mock.patch.object(jnp, "float32", jnp.float64):
        yield


def wide(tree):
    """All floats of a tree in float64."""
    floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64) if floating(x) else x, tree)


def double_network(pattern):
    """A network for `double`: attention by its definition, dense, which is written in any dtype."""
    return tiny.network(pattern, dtype="float64", attention="reference")


def exact(a, b):
    assert np.asarray(a).dtype == np.float64
    tiny.close(a, b, 1e-9)


def bounds(pattern, given, chunks):
    """Where chunks after the given frames begin, and where the last one ends."""
    frames = [given]
    for _ in range(chunks):
        frames.append(pattern.chunk_end(frames[-1]))
    return frames


@few(3)
@example(Pattern(chunk=1, window=4, sink=1), 7)  # the ring comes round, and all of it is needed
@given(patterns(), st.sampled_from([6, 7]))
def test_cached_equals_teacher_forced(pattern, frames):
    """Chunk by chunk against the cache is the parallel teacher-forced pass, for every frame."""
    net = tiny.network(pattern)
    params = tiny.params(net)
    clean, noisy = tiny.latents(net, frames), tiny.latents(net, frames, seed=1)
    chunk = pattern.chunk_index(frames)
    sigma = jax.random.uniform(jax.random.key(2), (2, frames))[:, chunk]
    actions = tiny.actions(frames)
    expected = jax.jit(lambda p: net.teacher_forced(p, clean, {"actions": actions})(noisy, sigma))(
        params
    )

    @jax.jit
    def evaluate(cache, x, sigma, frame, copy, actions):
        return net.apply(params, x, sigma, frame, copy, actions, None, cache)

    cache = net.dit.cache(2, pattern.window or frames, pattern.sink)
    for index in range(chunk[-1] + 1):
        frame = np.flatnonzero(chunk == index)
        part = np.s_[:, frame]
        noisy_copy = np.ones_like(frame)
        v, _ = evaluate(cache, noisy[part], sigma[part], frame, noisy_copy, actions[part])
        tiny.close(v, expected[part])
        clean_copy = CLEAN * noisy_copy
        _, key_value = evaluate(
            cache, clean[part], 0 * sigma[part], frame, clean_copy, actions[part]
        )
        cache = cache.write(frame, *key_value)


@pytest.mark.parametrize(
    ("pattern", "before", "guidance"),
    [
        (Pattern(chunk=2, window=4, sink=1), 5, 2.0),
        (Pattern(chunk=1, first_chunk=3, window=5, sink=1), 0, 2.0),
        (Pattern(chunk=3, first_chunk=1, window=7, sink=1), 0, None),
    ],
)
@double()
def test_fused_equals_separate_and_one_scan_equals_chunk_by_chunk(pattern, before, guidance):
    """With frames given or none, longer first chunks and schedules, guided or not.

    And a cache of the whole clip equals a ring, past its end, with more given than it holds; and
    what each chunk's last pass made of its input is what teacher forcing on the clip makes of it.
    """
    net = double_network(pattern).after(before)
    params, chunks = wide(tiny.params(net)), 4
    sampler = wide(consistency(2, 3.0, first_steps=3))
    edges = bounds(net.pattern, before, chunks)
    frames = edges[-1]
    x0, actions = wide(tiny.latents(net, before)), tiny.actions(frames)
    table = tiny.noise_table(net, frames, 3)
    noise = lambda frames, step: wide(table(frames, step))
    sigmas, last = sampler.of_chunks(chunks)
    clips = []
    for fused in (True, False):
        rollout = Rollout(net, sampler, guidance, fused)
        first = {"actions": actions[:, :before]}
        slots = frames if fused else pattern.window or frames  # whole clip, or a ring
        start = jax.jit(lambda p, r=rollout, f=first, s=slots: r.start(p, x0, f, s))(params)
        _, scanned = jax.jit(
            lambda p, s, r=rollout: r.unroll(
                p, s, {"actions": actions[:, before:]}, noise, sigmas, last
            )
        )(params, start)
        one = jax.jit(
            lambda p, s, a, levels, last, r=rollout: r.next_chunk(p, s, a, noise, levels, last)
        )
        stream, streamed = start, []
        for n, (i, j) in enumerate(itertools.pairwise(edges)):
            stream, chunk = one(params, stream, actions[:, i:j], sigmas[n], last[n])
            streamed.append(chunk.x0)
        clips += [scanned.x0, jnp.concatenate(streamed, 1)]
    for other in clips[1:]:
        exact(other, clips[0])

    clip, x = (jnp.concatenate([x0, part], 1) for part in (scanned.x0, scanned.x))
    sigma = jnp.broadcast_to(jnp.concatenate([jnp.ones(before), scanned.sigma]), x.shape[:2])
    weight = guidance or 1.0
    forced = lambda p: net.teacher_forced(p, clip, {"actions": actions}, weight)(x, sigma)
    exact(flow.to_x0(x, jax.jit(forced)(params), sigma)[:, before:], scanned.x0)


def test_guidance_away_from_a_text():
    """A rollout that is guided away from a negative text, and teacher forcing that is."""
    net = tiny.network(Pattern(window=3, sink=1), num_actions=0, text_dim=5, layers=1)
    params, rollout = tiny.params(net), Rollout(net, euler(1, 3.0), guidance=2.0)
    text, negative = np.random.default_rng(0).standard_normal((2, 2, 3, 5)).astype(np.float32)
    noise, ones = tiny.noise_table(net, 4, 1), jnp.ones((2, 4))

    @jax.jit
    def run(params, null):
        stream = rollout.start(params, tiny.latents(net, 0), {"text": text}, null=null)
        levels = jnp.tile(jnp.array([1.0, 0.0]), (4, 1))
        _, out = rollout.unroll(params, stream, {}, noise, levels, np.zeros(4, int))
        v = net.teacher_forced(params, out.x0, {"text": text}, 2.0, null)(out.x, ones)
        return out.x0, flow.to_x0(out.x, v, ones)

    zero, away = run(params, {}), run(params, {"text": negative})
    for clip, x0 in (zero, away):
        tiny.close(clip, x0)
    assert np.abs(away[0] - zero[0]).max() > 0.1


@functools.partial(jax.jit, static_argnums=0)
def evaluate(net, params, cache, x, sigma, frame, copy, actions):
    sigma = jnp.broadcast_to(sigma, x.shape[:2])
    return net.apply(params, x, sigma, frame, copy, actions, None, cache)


def naive_rollout(net, params, x0, actions, edges, noise, sigmas, last, straight_through):
    """Stage 3's rollout written the slow way: sequential, gradients through every last pass."""
    given, frames, stop = edges[0], edges[-1], jax.lax.stop_gradient

    def at(params, x, sigma, frame, copy):
        copy = np.full_like(frame, copy)
        return evaluate(net, params, cache, x, sigma, frame, copy, actions[:, frame])

    cache, out = net.dit.cache(len(x0), frames), [x0[:, :given]]
    if given:
        frame = np.arange(given, dtype=np.int32)
        cache = cache.write(frame, *at(stop(params), out[0], 0, frame, CLEAN)[1])
    for n, (i, j) in enumerate(itertools.pairwise(edges)):
        frame = np.arange(i, j, dtype=np.int32)
        x = noise(frame, 0)
        for step in range(last[n]):
            sigma, below = sigmas[n][step : step + 2]
            v, _ = at(stop(params), x, sigma, frame, 1)
            x = (1 - below) * stop(x - sigma * v) + below * noise(frame, step + 1)
        sigma = sigmas[n][last[n]]
        v, noisy_key_value = at(params, x, sigma, frame, 1)
        out.append(x - sigma * v)
        key_value = stop(at(stop(params), stop(out[-1]), 0, frame, CLEAN)[1])
        if straight_through:  # later chunks differentiate through this chunk's noisy keys
            pairs = zip(key_value, noisy_key_value, strict=True)
            key_value = [clean + noisy - stop(noisy) for clean, noisy in pairs]
        cache = cache.write(frame, *key_value)
    return jnp.concatenate(out, 1)


@pytest.mark.parametrize(
    ("pattern", "before", "last"),
    [
        (Pattern(chunk=3, window=7, sink=1), 4, (3, 0, 2)),
        (Pattern(chunk=1, first_chunk=3, window=5, sink=1), 0, (1, 2, 0)),
    ],
)
@double()
def test_replayed_gradient_equals_the_unrolled_one(pattern, before, last):
    """For both settings of the history's gradient, and exits at any step of each chunk."""
    net = double_network(pattern).after(before)
    params, last = wide(tiny.params(net)), np.array(last)
    edges = bounds(net.pattern, before, len(last))
    frames = edges[-1]
    x0, weight = wide([tiny.latents(net, frames), tiny.latents(net, frames - before, seed=5)])
    actions = tiny.actions(frames)
    condition = {"actions": actions}
    rollout = Rollout(net, wide(consistency(3, 3.0, first_steps=4)))
    table = tiny.noise_table(net, frames, 4)
    noise = lambda frames, step: wide(table(frames, step))
    cache, clip, inputs, sigma = jax.jit(
        lambda p: dmd.self_rollout(rollout, p, x0, condition, before, noise, last)
    )(params)
    sigmas = rollout.sampler.sigmas[np.minimum(np.arange(len(last)), 1)]

    def slope(run):

        def loss(p):
            out = run(p)
            return jnp.vdot(out, weight), out

        return jax.grad(loss, has_aux=True)

    for setting in ("none", "straight_through"):
        student = net.clone(history_gradient=setting)
        replay = slope(lambda p, s=student: dmd.replay(s, p, cache, inputs, sigma, condition))
        naive = slope(
            lambda p, through=setting == "straight_through": naive_rollout(
                net, p, x0, actions, edges, noise, sigmas, last, through
            )[:, before:]
        )
        (got, out), (expected, slow) = jax.jit(replay)(params), naive(params)
        exact(out, clip[:, before:])
        exact(slow, clip[:, before:])
        jax.tree.map(exact, got, expected)


@few(1)
@example(Pattern(chunk=3, first_chunk=1, window=5, sink=1), 7, 2)
@given(patterns(), st.sampled_from([5, 4]), st.sampled_from([3, 2]))
@double()
def test_draws_share_a_clean_pass_and_nothing_else(pattern, frames, draws):
    """Velocities, and the gradient of their sum, are those of one pass for each draw."""
    net = double_network(pattern)
    params = wide(tiny.params(net))
    clean, condition = wide(tiny.latents(net, frames)), {"actions": tiny.actions(frames)}
    noisy, weight = wide([tiny.latents(net, draws * frames, seed=seed) for seed in (1, 2)])
    sigma = jax.random.uniform(jax.random.key(2), (2, draws * frames))

    @jax.jit
    def run(params, noisy, sigma, weight):
        def loss(params):
            v = net.teacher_forced(params, clean, condition)(noisy, sigma)
            return jnp.vdot(v, weight), v

        return jax.grad(loss, has_aux=True)(params)

    parts = [np.s_[:, frames * n : frames * (n + 1)] for n in range(draws)]
    gradients, velocities = zip(
        *(run(params, noisy[part], sigma[part], weight[part]) for part in parts), strict=True
    )
    gradient, velocity = run(params, noisy, sigma, weight)
    exact(velocity, jnp.concatenate(velocities, 1))
    total = jax.tree.map(lambda *each: sum(each), *gradients)
    jax.tree.map(exact, gradient, total)


@pytest.mark.parametrize(
    ("pattern", "before", "changed_chunk"),
    [
        (Pattern(chunk=3, window=7, sink=1), 4, 1),
        (Pattern(window=3, sink=1), 0, 2),
    ],
)
def test_no_leak(pattern, before, changed_chunk):
    """What comes later changes nothing before its chunk, in training and in generation.

    Bit for bit, whether frame, action or noise; a clean frame changes nothing of its own chunk
    either.
    """
    net = tiny.network(pattern, layers=1).after(before)
    pattern = net.pattern
    params, other = tiny.params(net), tiny.params(net, seed=1)
    edges = bounds(pattern, before, 3)
    frames = edges[-1]
    chunk = pattern.chunk_index(frames)
    index = jnp.asarray(np.random.default_rng(0).integers(0, 4, (2, chunk[-1] + 1))[:, chunk])
    grid = jnp.asarray(flow.grid(4, 3.0))
    rollout = Rollout(net, consistency(2, 3.0))

    @jax.jit
    def outputs(clean, noise, actions):
        condition = {"actions": actions}
        field = lambda p, x, *guidance: net.teacher_forced(p, x, condition, *guidance)
        student, ema, teacher = field(params, clean), field(other, clean), field(other, clean, 2.0)
        at = lambda frames, step: noise[step % 2][:, frames]
        cache, clip, inputs, level = dmd.self_rollout(
            rollout, params, clean, condition, before, at, np.array([0, 1, 1])
        )
        replayed = dmd.replay(net, params, cache, inputs, level, condition)
        critic, real = field(other, clip), field(params, clip, 2.0)
        x = flow.interpolate(clip, noise[0], grid[index])
        # Of the gradient g only these: its mean |x - x0_real| runs over the whole clip, so that an
        # early frame's g does depend on later frames, by a factor that all frames share.
        x0 = lambda field: flow.to_x0(x, field(x, grid[index]), grid[index])
        return {
            "velocity": student(noise[0], grid[index]),
            "stage 1": flow.matching_loss(student, clean, noise[0], grid[index]),
            "stage 2": stage2.loss(student, ema, teacher, clean, noise[0], index, grid, "heun"),
            "stage 2, ODE": ode.trajectory(teacher, noise[0], grid)[-1],
            "stage 3": clip,
            "stage 3, replayed": jnp.concatenate([clip[:, :before], replayed], 1),
            "stage 3, critic": flow.matching_loss(critic, clip, noise[0], grid[index]),
            "stage 3, x0 of the real score": x0(real),
            "stage 3, x0 of the critic": x0(critic),
        }

    clean, actions = tiny.latents(net, frames), tiny.actions(frames)
    noise = jnp.stack([tiny.latents(net, frames, seed=seed) for seed in (1, 2)])
    i = sum(edges[changed_chunk : changed_chunk + 2]) // 2  # in the middle of its chunk
    past, before_own = np.flatnonzero(chunk < chunk[i]), np.flatnonzero(chunk <= chunk[i])
    usual = outputs(clean, noise, actions)
    changed = outputs(
        clean.at[:, i].add(1), noise.at[:, :, i].add(1), actions.at[:, i].set(tiny.ACTIONS)
    )
    for name, value in usual.items():
        np.testing.assert_array_equal(value[:, past], changed[name][:, past], name)
        assert np.any(value[:, i] != changed[name][:, i]), f"{name} does not see its own frame"
    of_clean = outputs(clean.at[:, i].add(1), noise, actions)
    for name in ("velocity", "stage 2, ODE", "stage 3"):
        np.testing.assert_array_equal(
            usual[name][:, before_own], of_clean[name][:, before_own], name
        )
    seeing = np.flatnonzero(pattern.visible(np.arange(frames), 1, i, CLEAN))
    assert seeing.size or chunk[i] == chunk[-1]
    for j in seeing:
        assert np.any(usual["velocity"][:, j] != of_clean["velocity"][:, j]), (i, j)
