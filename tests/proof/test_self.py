"""The pipeline against itself: exact equalities, over random patterns of attention.

Each function is computed in two ways that share no more than the network. Float32 rounds each
operation by 6e-8 of its value; through a network of two layers that is below 1e-5 of the largest
output, and below 1e-4 after a rollout's up to nine passes on one another's outputs.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from cfpp import flow
from cfpp.attention.pattern import CLEAN, Pattern
from cfpp.rollout.generate import Rollout, consistency
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
    return Pattern(chunk, first_chunk, window, sink)


@few(5)
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


@st.composite
def continued(draw):
    """A pattern, and frames that its chunks start anew after."""
    pattern = dataclasses.replace(draw(patterns()), first_chunk=None)
    return pattern, draw(st.sampled_from([0, 1, 4]))


@few(2)
@example((Pattern(chunk=2, window=4, sink=1), 5), 2.0)
@given(continued(), st.sampled_from([2.0, 1.0]))
def test_fused_equals_separate_and_one_scan_equals_chunk_by_chunk(case, guidance):
    """With frames given or none, a longer first schedule, guided or not.

    And a cache of the whole clip equals a ring, past its end, with more given than it holds.
    """
    pattern, before = case
    net = tiny.network(pattern)
    params, chunks = tiny.params(net), 4
    sampler = consistency(2, 3.0, first_steps=3)
    frames = before + chunks * pattern.chunk
    x0, actions = tiny.latents(net, before), tiny.actions(frames)
    noise = tiny.noise_table(net, frames, 3)
    rows = np.minimum(np.arange(chunks), 1)
    sigmas, last = sampler.sigmas[rows], sampler.last[rows]
    clips = []
    for fused in (True, False):
        rollout = Rollout(net, sampler, guidance, fused).after(before)
        first = {"actions": actions[:, :before]}
        slots = frames if fused else pattern.window or frames  # whole clip, or a ring
        start = jax.jit(lambda p, r=rollout, f=first, s=slots: r.start(p, x0, f, s))(params)
        _, scanned = jax.jit(
            lambda p, s, r=rollout: r.unroll(
                p, s, {"actions": actions[:, before:]}, chunks, noise, jnp.asarray(sigmas), last
            )
        )(params, start)
        one = jax.jit(
            lambda p, s, a, levels, last, r=rollout: r.chunk(p, s, a, noise, levels, last)
        )
        stream, streamed = start, []
        for n in range(chunks):
            i = before + n * pattern.chunk
            now = actions[:, i : i + pattern.chunk]
            stream, chunk = one(params, stream, now, sigmas[n], last[n])
            streamed.append(chunk.x0)
        clips += [scanned.x0, jnp.concatenate(streamed, 1)]
    for other in clips[1:]:
        tiny.close(other, clips[0], 1e-4)


@functools.partial(jax.jit, static_argnums=0)
def evaluate(net, params, cache, x, sigma, frame, copy, actions):
    sigma = jnp.broadcast_to(sigma, x.shape[:2])
    return net.apply(params, x, sigma, frame, copy, actions, None, cache)


def naive_rollout(net, params, x0, actions, given, noise, sigmas, last, straight_through):
    """Stage 3's rollout written the slow way: sequential, gradients through every last pass."""
    frames, chunk, stop = x0.shape[1], net.pattern.chunk, jax.lax.stop_gradient

    def at(params, x, sigma, frame, copy):
        copy = np.full_like(frame, copy)
        return evaluate(net, params, cache, x, np.float32(sigma), frame, copy, actions[:, frame])

    cache, out = net.dit.cache(len(x0), frames), [x0[:, :given]]
    if given:
        frame = np.arange(given)
        cache = cache.write(frame, *at(stop(params), out[0], 0, frame, CLEAN)[1])
    for n, i in enumerate(range(given, frames, chunk)):
        frame, x = np.arange(i, i + chunk), noise(i, 0)
        for step in range(last[n]):
            sigma, below = sigmas[n][step : step + 2]
            v, _ = at(stop(params), x, sigma, frame, 1)
            x = (1 - below) * stop(x - sigma * v) + below * noise(i, step + 1)
        sigma = sigmas[n][last[n]]
        v, noisy_key_value = at(params, x, sigma, frame, 1)
        out.append(x - sigma * v)
        key_value = stop(at(stop(params), stop(out[-1]), 0, frame, CLEAN)[1])
        if straight_through:  # later chunks differentiate through this chunk's noisy keys
            pairs = zip(key_value, noisy_key_value, strict=True)
            key_value = [clean + noisy - stop(noisy) for clean, noisy in pairs]
        cache = cache.write(frame, *key_value)
    return jnp.concatenate(out, 1)


@few(1)
@example((Pattern(chunk=2, window=5, sink=1), 3), (3, 0, 2))
@given(continued(), st.sampled_from([(1, 0, 2), (0, 2, 1)]))
def test_replayed_gradient_equals_the_unrolled_one(case, last):
    """For both settings of the history's gradient, and exits at any step of each chunk."""
    pattern, before = case
    net = tiny.network(pattern)
    params, chunks, last = tiny.params(net), 3, np.array(last)
    frames = before + chunks * pattern.chunk
    x0, weight = tiny.latents(net, frames), tiny.latents(net, frames - before, seed=5)
    actions = tiny.actions(frames)
    condition = {"actions": actions}
    rollout = Rollout(net, consistency(3, 3.0, first_steps=4)).after(before)
    net, noise = rollout.network, tiny.noise_table(net, frames, 4)
    cache, clip, inputs, sigma = jax.jit(
        lambda p: dmd.self_rollout(rollout, p, x0, condition, before, noise, last)
    )(params)
    sigmas = rollout.sampler.sigmas[np.minimum(np.arange(chunks), 1)]

    def slope(run):

        def loss(p):
            out = run(p)
            return jnp.vdot(out, weight), out

        return jax.grad(loss, has_aux=True)

    for setting in ("none", "straight_through"):
        student = dataclasses.replace(net, dit=net.dit.clone(history_gradient=setting))
        replay = slope(lambda p, s=student: dmd.replay(s, p, cache, inputs, sigma, condition))
        naive = slope(
            lambda p, through=setting == "straight_through": naive_rollout(
                net, p, x0, actions, before, noise, sigmas, last, through
            )[:, before:]
        )
        (got, out), (expected, slow) = jax.jit(replay)(params), naive(params)
        tiny.close(out, clip[:, before:], 1e-4)
        tiny.close(slow, clip[:, before:], 1e-4)
        scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * scale)


@few(2)
@given(patterns(), st.sampled_from([5, 4]), st.sampled_from([3, 2]))
def test_draws_share_a_clean_pass_and_nothing_else(pattern, frames, draws):
    """Velocities, and the gradient of their sum, are those of one pass for each draw."""
    net = tiny.network(pattern)
    params = tiny.params(net)
    clean, condition = tiny.latents(net, frames), {"actions": tiny.actions(frames)}
    noisy, weight = (tiny.latents(net, draws * frames, seed=seed) for seed in (1, 2))
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
    tiny.close(velocity, jnp.concatenate(velocities, 1))
    total = jax.tree.map(lambda *each: sum(each), *gradients)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(total), strict=True):
        tiny.close(a, b, 1e-4)


@few(3)
@given(continued(), st.sampled_from([1, 0, 2]))
def test_no_leak(case, changed_chunk):
    """What comes later changes nothing before its chunk, in training and in generation.

    Bit for bit, whether frame, action or noise; a clean frame changes nothing of its own chunk
    either.
    """
    pattern, before = case
    pattern = pattern.after(before)
    net = tiny.network(pattern, layers=1)
    params, other = tiny.params(net), tiny.params(net, seed=1)
    chunks = 3
    frames = before + chunks * pattern.chunk
    chunk = pattern.chunk_index(frames)
    index = jnp.asarray(np.random.default_rng(0).integers(0, 4, (2, chunk[-1] + 1))[:, chunk])
    grid = jnp.asarray(flow.grid(4, 3.0))
    rollout = Rollout(net, consistency(2, 3.0))

    @jax.jit
    def outputs(clean, noise, actions):
        condition = {"actions": actions}
        field = lambda p, *guidance: net.teacher_forced(p, clean, condition, *guidance)
        student, ema, teacher = field(params), field(other), field(other, 2.0)
        at = lambda frame, step: jax.lax.dynamic_slice_in_dim(
            noise[step % 2], frame, pattern.chunk, 1
        )
        _, clip, inputs, _ = dmd.self_rollout(
            rollout, params, clean, condition, before, at, np.array([0, 1, 1])
        )
        return {
            "velocity": student(noise[0], grid[index]),
            "stage 1": flow.matching_loss(student, clean, noise[0], grid[index]),
            "stage 2": stage2.loss(student, ema, teacher, clean, noise[0], index, grid, "heun"),
            "stage 2, ODE": ode.trajectory(teacher, noise[0], grid)[-1],
            "stage 3": clip,
            "stage 3, replayed": jnp.pad(inputs, ((0, 0), (before, 0)) + ((0, 0),) * 3),
        }

    clean, actions = tiny.latents(net, frames), tiny.actions(frames)
    noise = jnp.stack([tiny.latents(net, frames, seed=seed) for seed in (1, 2)])
    i = before + changed_chunk * pattern.chunk + pattern.chunk // 2
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
    if pattern.window is None and chunk[i] < chunk[-1]:
        assert np.any(usual["velocity"][:, i + 1 :] != of_clean["velocity"][:, i + 1 :])
