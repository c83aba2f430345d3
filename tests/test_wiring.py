"""What stages hand to their equations: which network, which noise, which level.

The steps run with the networks replaced by labels and the equations by recorders, so that nothing
is compiled and everything can be seen.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from cfpp import flow, stages
from cfpp.models import codec
from cfpp.models.network import Network
from cfpp.rollout.generate import gaussian_noise
from cfpp.stages import ar_diffusion, bidirectional, consistency, dmd, ode
from cfpp.stages import stage as stage_module
from cfpp.stages.stage import advance, average, descend, start
from tests import tiny
from tests.test_stages import batch, parents, tiny_config


@pytest.fixture
def labelled(monkeypatch):
    """Velocity fields are tuples that say what they were made of; nothing is differentiated."""
    zeros = lambda params: jax.tree.map(jnp.zeros_like, params)
    value_alone = lambda loss, params, inputs, _: (loss(params, inputs), zeros(params))
    monkeypatch.setattr(stage_module, "accumulated", value_alone)
    for module in (bidirectional, consistency, ode, dmd, ar_diffusion):
        monkeypatch.setattr(module, "optimizer", lambda *_: optax.sgd(0.1))
    monkeypatch.setattr(
        Network, "teacher_forced",
        lambda self, params, clean, condition, guidance=1.0: (params, clean, condition, guidance),
    )  # fmt: skip
    monkeypatch.setattr(
        ar_diffusion, "resample", lambda rng, network, params, clean, *_, **__: clean
    )
    monkeypatch.setattr(
        Network, "bidirectional",
        lambda self, params, condition, guidance=1.0: (params, None, condition, guidance),
    )  # fmt: skip


def states(name, clips=16, **fields):
    """A stage, its first state, a batch and the parents; every network has its own values."""
    config = tiny_config(name, "chunk=3" if fields.pop("chunk", 1) == 3 else "", **fields)
    config.model.update({"layers": 1})
    stage = stages.build(config)
    shapes = jax.eval_shape(stage.init, jax.random.key(0), parents(config, stage))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), nn.meta.unbox(shapes))
    numbers = iter(range(1, 9))

    label = lambda tree: {"label": jnp.float32(next(numbers))}

    state = state.replace(
        params={name: label(tree) for name, tree in state.params.items()},
        ema=label(state.ema),
        frozen={role: label(tree) for role, tree in state.frozen.items()},
    )
    return config, stage, state, batch(config, clips)


def label_of(params) -> float:
    return float(jax.tree.leaves(params)[0].ravel()[0])


def record(monkeypatch, module, name, result):
    """Replaces a function by one that keeps its arguments; returns the list of calls."""
    calls = []

    def recorder(*args, **kwargs):
        calls.append(args)
        return result(*args, **kwargs)

    monkeypatch.setattr(module, name, recorder)
    return calls


def no_loss(x):
    return jnp.zeros(x.shape[:2])


def differ(x, axis):
    """Whether the slices of `x` along an axis differ from one another."""
    first, *others = np.moveaxis(np.asarray(x), axis, 0)
    return all(np.any(first != other) for other in others)


def check_median(sigma, shift, draws):
    """Uniform before the shift: the median of n draws lies within 5 times 1 / (2 sqrt(n))."""
    spread = 2.5 / np.sqrt(draws)
    low, high = flow.shift(0.5 - spread, shift), flow.shift(0.5 + spread, shift)
    assert low < np.median(sigma) < high and not low < 0.5 < high  # which tells it from no shift


def test_bidirectional(labelled, monkeypatch):
    """One level a clip; a first frame that is given has level 0, and no part in the loss."""
    config, stage, state, clips = states("bidirectional", 128, given_rate=0.25, drop_rate=0.0)
    error = lambda velocity, x0, noise, sigma, floor: 1.0 + 1000 * (sigma == 0)
    calls = record(monkeypatch, flow, "matching_loss", error)
    _, metrics = stage.step(state, clips, jax.random.key(0))
    velocity, x0, noise, sigma, floor = calls[0]
    np.testing.assert_array_equal(x0, codec.encode(clips["video"]))
    assert velocity[3] == 1.0 and floor == config.sigma_floor
    assert differ(noise, 0) and differ(noise, 1)
    held = np.asarray(sigma)[:, 0] == 0
    assert 8 <= held.sum() <= 56  # 32 +- 5 x 4.9
    np.testing.assert_array_equal(sigma[~held], sigma[~held][:, 1:2].repeat(4, 1))
    np.testing.assert_array_equal(sigma[:, 1:], sigma[:, 1:2].repeat(3, 1))
    assert np.all(sigma[:, 1:] > 0) and differ(sigma[:, 1], 0)
    check_median(sigma[:, 1], config.shift, len(sigma))
    assert metrics["loss"] == pytest.approx(1.0)


def test_consistency(labelled, monkeypatch):
    config, stage, state, clips = states(
        "consistency", 64, chunk=3, draws=2, guidance=3.0, grid_steps=4, grid_doublings=0
    )
    calls = record(monkeypatch, consistency, "loss", lambda s, e, t, x0, *_: no_loss(x0))
    stage.step(state, clips, jax.random.key(0))
    (student, ema, teacher, x0, noise, index, grid, solver, distance) = calls[0]
    assert label_of(ema[0]) == label_of(state.ema) and ema[3] == 1.0
    assert label_of(teacher[0]) == label_of(state.frozen["teacher"]) and teacher[3] == 3.0
    assert label_of(student[0]) == label_of(state.params["model"]) and student[3] == 1.0
    assert (solver, distance) == (config.solver, config.distance)
    np.testing.assert_array_equal(grid, flow.grid(4, config.shift))
    assert np.unique(index).tolist() == [0, 1, 2, 3]  # the last pair too
    np.testing.assert_array_equal(x0[:, :7], x0[:, 7:])
    assert differ(np.reshape(noise, (64, 2, -1)), 1)
    check_levels(np.reshape(index, (64, 2, 7)))


@pytest.mark.parametrize(("step", "size"), [(0, 2), (32, 2), (33, 4), (66, 4), (67, 8), (101, 8)])
def test_consistency_doubles_its_grid(labelled, monkeypatch, step, size):
    config, stage, state, clips = states("consistency", steps=101, grid_steps=8, grid_doublings=2)
    calls = record(monkeypatch, consistency, "loss", lambda s, e, t, x0, *_: no_loss(x0))
    stage.step(state.replace(step=jnp.int32(step)), clips, jax.random.key(0))
    index, grid = calls[0][5:7]
    np.testing.assert_array_equal(grid[: size + 1], flow.grid(size, config.shift))
    assert np.unique(index).tolist() == list(range(size))


def check_levels(level):
    """`[B, draws, F]`: one a chunk of each draw, chunks of 1, 3 and 3 frames."""
    np.testing.assert_array_equal(level[:, :, 1:4], level[:, :, 1:2].repeat(3, 2))
    np.testing.assert_array_equal(level[:, :, 4:], level[:, :, 4:5].repeat(3, 2))
    assert differ(level, 1) and differ(level[:, :, [0, 1, 4]], 2) and differ(level, 0)


def test_ar_diffusion(labelled, monkeypatch):
    config, stage, state, clips = states("ar_diffusion", 64, chunk=3, draws=2, drop_rate=0.25)
    calls = record(monkeypatch, flow, "matching_loss", lambda v, x0, *_: no_loss(x0))
    stage.step(state, clips, jax.random.key(0))
    velocity, x0, noise, sigma, floor = calls[0]
    np.testing.assert_array_equal(x0, jnp.concatenate([velocity[1]] * 2, 1))
    assert differ(np.reshape(noise, (64, 2, -1)), 1) and floor == config.sigma_floor
    check_levels(np.reshape(sigma, (64, 2, 7)))
    assert abs(np.median(sigma) - flow.shift(0.5, config.shift)) < 0.1
    dropped = np.all(velocity[2]["actions"] == config.model.num_actions, 1)
    assert 4 <= dropped.sum() <= 30  # 16 +- 3.5
    np.testing.assert_array_equal(velocity[2]["actions"][~dropped], clips["actions"][~dropped])


def test_ar_diffusion_weighs_levels_by_a_bell(labelled, monkeypatch):
    config, stage, state, clips = states("ar_diffusion", bell_weight=True)
    calls = record(monkeypatch, flow, "matching_loss", lambda v, x0, *_: 1 + no_loss(x0))
    _, metrics = stage.step(state, clips, jax.random.key(0))
    _, _, _, sigma, _ = calls[0]
    np.testing.assert_allclose(metrics["loss"], flow.bell_weight(sigma, config.shift).mean(), 1e-5)
    np.testing.assert_allclose(flow.bell_weight(flow.grid(1000, 8.0)[:-1], 8.0).mean(), 1, 1e-5)
    np.testing.assert_allclose(flow.bell_weight(np.array([0.0, 1.0]), 8.0), 0, atol=1e-6)


def test_ar_diffusion_is_forced_on_what_it_makes(labelled, monkeypatch):
    config, stage, state, clips = states("ar_diffusion")
    made = record(monkeypatch, ar_diffusion, "resample", lambda *_, rate, sigma: "history")
    calls = record(monkeypatch, flow, "matching_loss", lambda v, x0, *_: no_loss(x0))
    stage.step(state, clips, jax.random.key(0))
    (_, network, params, clean, condition), (velocity, x0, *_) = made[0], calls[0]
    assert label_of(params) == label_of(state.params["model"])
    assert network.pattern.window == config.pattern.window
    np.testing.assert_array_equal(clean, codec.encode(clips["video"]))
    np.testing.assert_array_equal(condition["actions"], clips["actions"])
    assert velocity[1] == "history"
    np.testing.assert_array_equal(x0, clean)  # it is to predict the data all the same


def test_ode(labelled, monkeypatch):
    config, stage, state, clips = states("ode", guidance=2.0)
    path = lambda noise, grid: jnp.arange(len(grid))[:, None, None, None, None, None] + 0 * noise
    record(monkeypatch, ode, "trajectory", lambda teacher, noise, grid, solver: path(noise, grid))
    calls = record(monkeypatch, ode, "loss", lambda student, x, *_: no_loss(x))
    stage.step(state, clips, jax.random.key(0))
    _, x, sigma, endpoint = calls[0]
    frames, grid = config.data.frames, flow.grid(config.grid_steps, config.shift)
    levels = flow.schedule(config.positions, config.shift)[:-1]
    np.testing.assert_allclose(sigma[0], levels.repeat(frames), rtol=1e-6)
    np.testing.assert_array_equal(grid[np.asarray(x[0, :, 0, 0, 0], int)], sigma[0])
    np.testing.assert_array_equal(endpoint, config.grid_steps)


@pytest.mark.parametrize("real_score", dmd.REAL_SCORES)
def test_matching(labelled, monkeypatch, real_score):
    """Fresh rollouts of the student for every step of the critic, and for its own."""
    config, stage, state, clips = states(
        "dmd", critic_steps=2, guidance=3.0, first_positions=(1000.0, 750.0, 500.0),
        real_score=real_score, history_gradient="straight_through",
    )  # fmt: skip
    given, frames = config.given, config.data.frames
    rollouts = []

    def rolled_out(rollout, params, x0, condition, given, noise, last):
        x = x0 + 1 + len(rollouts)
        rollouts.append(
            (rollout, label_of(params), np.asarray(noise(np.array([1]), 0)), np.asarray(last), x)
        )
        return None, x, x[:, given:], jnp.ones(frames - given)

    monkeypatch.setattr(dmd, "self_rollout", rolled_out)
    critic = record(monkeypatch, flow, "matching_loss", lambda v, x0, *_: no_loss(x0))
    g = record(monkeypatch, dmd, "gradient", lambda real, fake, x, *_: 2 * x)
    replays = record(monkeypatch, dmd, "replay", lambda n, params, cache, inputs, *_: 3 * inputs)
    losses = record(monkeypatch, dmd, "loss", lambda x, g: no_loss(x))
    with jax.disable_jit():
        for seed in range(6):
            stage.step(state, clips, jax.random.key(seed))

    assert len(rollouts) == 18 and len(critic) == 12 and len(g) == 6
    student = label_of(state.params["model"])
    assert {label for _, label, *_ in rollouts} == {student}
    noises = np.stack([noise for _, _, noise, *_ in rollouts])
    assert all(differ(noises[[0, i]], 0) for i in range(1, 18)) and differ(noises, 1)
    lasts = np.stack([last for *_, last, _ in rollouts])
    assert np.unique(lasts[:, 0]).tolist() == [0, 1, 2]  # the first chunk's own schedule
    assert np.unique(lasts[:, 1:]).tolist() == [0, 1]
    sampler = rollouts[0][0].sampler
    for row, positions in enumerate((config.first_positions, config.positions)):
        levels = flow.schedule(positions, config.shift)
        np.testing.assert_array_equal(sampler.sigmas[row, : len(levels)], levels)

    for i, (velocity, x, *_) in enumerate(critic):
        own = rollouts[3 * (i // 2) + i % 2][-1]
        np.testing.assert_array_equal(x, own)
        check_field(velocity, state.params["critic"], own, 1.0, real_score)
    for i, (real, fake, x, _, _) in enumerate(g):
        own = rollouts[3 * i + 2][-1]
        np.testing.assert_array_equal(x, own)
        check_field(real, state.frozen["real"], own, 3.0, real_score)
        check_field(fake, state.params["critic"], own, 1.0, real_score)
        network, params, _, inputs, level, condition = replays[i]
        assert network.dit.history_gradient == "straight_through"
        assert label_of(params) == student
        np.testing.assert_array_equal(inputs, own[:, given:])
        np.testing.assert_array_equal(level, np.ones(frames - given))
        np.testing.assert_array_equal(condition["actions"], clips["actions"])
        replayed, slope = losses[i]
        np.testing.assert_array_equal(replayed, 3 * own[:, given:])
        np.testing.assert_array_equal(slope, 2 * own[:, given:])

    sigma = np.stack([call[3] for call in critic] + [call[4] for call in g])
    np.testing.assert_array_equal(sigma[:, :, :given], 0)
    sigma = sigma[:, :, given:]  # [steps, clips, generated frames]
    assert np.all((sigma >= config.score_sigma[0]) & (sigma <= config.score_sigma[1]))
    assert differ(sigma, 0) and differ(sigma, 1)
    if real_score == "causal":
        assert differ(sigma, 2)
    else:
        np.testing.assert_array_equal(sigma, sigma[:, :, :1].repeat(frames - given, 2))
    check_median(sigma, config.score_shift, sigma[:, :, 0].size)


def check_field(field, params, clip, guidance, real_score):
    """A score of the whole clip, or one that is teacher-forced on it."""
    of, history, _, weight = field
    assert label_of(of) == label_of(params) and weight == guidance
    if real_score == "causal":
        np.testing.assert_array_equal(history, clip)
    else:
        assert history is None


def test_target_carries_no_gradient():
    """Even where the average is the student itself."""
    x0, noise = tiny.latents(tiny.network(), 3), tiny.latents(tiny.network(), 3, seed=1)
    grid, index = jnp.asarray(flow.grid(4, 3.0)), jnp.array([[0, 1, 2]] * 2)
    field = lambda w: lambda x, sigma: w * x
    loss = lambda w, ema: consistency.loss(
        field(w), field(ema), field(0.5), x0, noise, index, grid
    ).sum()
    slope = jax.grad(lambda w: loss(w, w))(2.0)
    assert slope == pytest.approx(float(jax.grad(loss)(2.0, 2.0)), rel=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_descent_is_clipped_averaged_and_counted(accumulate):
    """Of |p - x|^2 / 2 averaged over a batch: gradient p - mean(x), all in closed form."""
    config = ml_collections.ConfigDict({"ema": {"decay": 0.75, "start": 0}})
    transform = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.5))
    x, p = jnp.array([1.0, 5.0, 2.0, 8.0]), jnp.float32(0.0)
    loss = lambda params, x: jnp.mean((params - x) ** 2) / 2
    state, metrics = descend(start(p, transform), "model", transform, loss, x, accumulate)
    state = advance(state, config)
    assert metrics["loss"] == 11.75 and metrics["grad_norm"] == 4.0 and int(state.step) == 1
    assert state.params["model"] == 0.5  # half of the clipped gradient
    assert state.ema == np.float32(0.45)  # nine tenths of the way, as the first step's average


def test_average_of_parameters():
    """From `start` on (1 + n) / (10 + n) is kept, until that is more than the decay: n = 8."""
    config = ml_collections.ConfigDict({"decay": 0.5, "start": 5})
    kept = [1 - average(0.0, 1.0, jnp.int32(step), config) for step in range(20)]
    expected = [0] * 5 + [(1 + n) / (10 + n) for n in range(8)] + [0.5] * 7
    np.testing.assert_allclose(kept, expected, rtol=1e-6)


def test_noise_of_a_rollout_is_fresh():
    noise = gaussian_noise(jax.random.key(0), (1, 2, 4))
    table = np.array([noise(np.arange(3), step) for step in range(3)])
    assert len(np.unique(table)) == table.size
    np.testing.assert_array_equal(noise(np.array([2]), 1)[0], table[1, 2])  # in any chunk


def test_condition_is_dropped_at_its_rate():
    net = tiny.network()
    condition = {"actions": tiny.actions(4, batch=400)}
    dropped = np.asarray(net.drop(jax.random.key(0), condition, 0.25)["actions"])
    none = np.all(dropped == tiny.ACTIONS, 1)
    assert 60 <= none.sum() <= 140  # 100 +- 9
    np.testing.assert_array_equal(dropped[~none], condition["actions"][~none])
