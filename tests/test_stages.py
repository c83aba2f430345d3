"""One contract for all stages, and what is particular to each."""

import importlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfpp import flow, stages
from cfpp.attention.pattern import Pattern
from cfpp.models.network import Network, cast_products
from cfpp.stages import consistency, dmd, ode
from cfpp.stages.resample import resample
from cfpp.stages.stage import inherit, optimizer, unpack
from configs import common
from tests import tiny

CONFIGS = {
    "bidirectional": "stage0",
    "ar_diffusion": "stage1",
    "consistency": "stage2",
    "ode": "stage2_ode",
    "dmd": "stage3",
}


def tiny_config(stage: str, arg: str = "", **fields):
    config = importlib.import_module(f"configs.{CONFIGS[stage]}").get_config(arg)
    config.steps = 10
    config.data.update({"frames": 7 if "chunk" in arg else 4, "height": 8, "width": 8})
    config.model.update(
        {"height": 8, "width": 8, "patch": 4, "dim": 24, "ffn_dim": 32, "heads": 2, "layers": 2}
    )
    config.model.update({"frequency_dim": 16, "unroll": 1})
    config.update(fields)
    return config


def batch(config, size: int = 2):
    rng = np.random.default_rng(0)
    shape = (size, config.data.frames, 8, 8, 3)
    return {
        "video": rng.integers(0, 256, shape, dtype=np.uint8),
        "actions": rng.integers(0, 5, shape[:2], dtype=np.int32),
    }


def parents(config, stage):
    network = Network.create(config.model, config.pattern)
    required = (role for role, parent in stage.parents.items() if parent.required)
    return {role: tiny.params(network, seed=7) for role in required}


VARIANTS = {
    "bidirectional": ("bidirectional", "", {}),
    "ar_diffusion": ("ar_diffusion", "", {"draws": 2, "drop_rate": 0.5}),
    "ar_diffusion-chunk": ("ar_diffusion", "chunk=3", {}),
    "ar_diffusion-clean": ("ar_diffusion", "", {"resample": {"rate": 0.0}}),
    "consistency": ("consistency", "", {"guidance": 2.0, "draws": 2}),
    "consistency-chunk-heun": (
        "consistency", "chunk=3", {"solver": "heun", "distance": "pseudo_huber"},
    ),
    "ode": ("ode", "", {"guidance": 2.0}),
    "dmd-causal-chunk": ("dmd", "chunk=3", {"first_positions": (1000.0, 750.0, 500.0)}),
}  # fmt: skip


def test_frozen_in_the_dtype_of_its_products_a_network_stays_the_same():
    """So at the first step of stage 3 the critic is the real score, to the bit."""
    net = tiny.network(dtype="bfloat16")
    params, x = tiny.params(net), tiny.latents(net, 3)
    frozen = cast_products(params, "bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(frozen)} == {"bfloat16", "float32"}
    run = jax.jit(lambda p: net.bidirectional(p, {"actions": tiny.actions(3)})(x, sigma))
    sigma = jnp.full((2, 3), 0.5)
    np.testing.assert_array_equal(run(frozen), run(params))
    jax.tree.map(np.testing.assert_array_equal, net.for_inference(params), frozen)


def test_a_parent_may_be_an_export_in_bfloat16():
    net = tiny.network()
    template = net.init(jax.random.key(0))
    half = cast_products(tiny.params(net, seed=7), "bfloat16")
    params = nn.meta.unbox(inherit(template, half))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    jax.tree.map(np.testing.assert_array_equal, params, half)


@pytest.mark.parametrize("variant", VARIANTS)
def test_contract(variant):
    """It jits once, stays finite, moves what it trains and nothing else, and counts its steps."""
    name, arg, fields = VARIANTS[variant]
    config = tiny_config(name, arg, **fields)
    stage = stages.build(config)
    state = nn.meta.unbox(jax.jit(stage.init)(jax.random.key(0), parents(config, stage)))
    compiled = []

    @jax.jit
    def step(state, batch, rng):
        compiled.append(1)
        return stage.step(state, batch, rng)

    before = state
    for i in range(3):
        state, metrics = step(state, batch(config), jax.random.key(i))
        assert all(np.isfinite(value) and value.shape == () for value in metrics.values())
    assert len(compiled) == 1 and int(state.step) == 3
    assert "loss" in metrics
    jax.tree.map(np.testing.assert_array_equal, before.frozen, state.frozen)
    for tree in ("params", "optimizer", "ema"):
        for old, new in zip(
            *map(jax.tree.leaves, (vars(before)[tree], vars(state)[tree])), strict=True
        ):
            assert old.dtype == new.dtype and old.shape == new.shape
    for network in state.params:
        heads = (np.asarray(each.params[network]["head"]["kernel"]) for each in (before, state))
        assert not np.array_equal(*heads), f"{network} did not move"


@pytest.mark.parametrize(
    ("stage", "fields", "message"),
    [
        ("bidirectional", {"data.frames": 1}, "data.frames is 1; with a given_rate above 0"),
        ("consistency", {"solver": "rk4"}, "^config.solver must be one of euler, heun, got 'rk4'"),
        ("consistency", {"distance": "l3"}, "^config.distance must be one of mse, pseudo_huber"),
        ("consistency", {"grid_steps": 9}, "config.grid_doublings is 2; config.grid_steps, 9"),
        ("consistency", {"grid_doublings": 4}, "config.grid_doublings is 4; config.grid_steps, 8"),
        ("consistency", {"positions": (500.0, 1000.0)}, "sampling positions must fall, from 1000"),
        ("ode", {"positions": (1000.0, 333.0)}, "do not all lie on the grid of 16 steps"),
        ("dmd", {"real_score": "none"}, "^config.real_score must be one of bidirectional, causal"),
        ("dmd", {"history_gradient": "all"}, "^config.history_gradient must be one of none"),
        ("dmd", {"critic_steps": 0}, "critic_steps is 0; it must be at least 1"),
        ("dmd", {"given": 4}, "config.given is 4; it must be at least 0 and less than 4"),
        ("dmd", {"score_sigma": (0.9, 0.1)}, "score_sigma must be a range within 0 and 1"),
        ("dmd", {"score_sigma": (0.1, 0.5, 0.9)}, "score_sigma must be a range within 0 and 1"),
        (
            "dmd",
            {"score_sigma": (0.0, 0.9)},
            "config.score_sigma starts at 0, where nothing is noised",
        ),
        (
            "dmd",
            {"pattern.sink": 4, "pattern.window": 8},
            "room for a sink of 4 frames and the first",
        ),
        (
            "ar_diffusion",
            {"optimizer.schedule": "cosin"},
            "^config.optimizer.schedule must be one of",
        ),
        (
            "dmd",
            {"critic_optimizer.name": "adam"},
            "^config.critic_optimizer.name must be one of adamw",
        ),
        ("dmd", {"real_model": {"heads": 5}}, "^with config.real_model, "),
        ("ar_diffusion", {"resample.sigma": (0.8, 0.3)}, "resample.sigma must be a range within 0"),
        ("ar_diffusion", {"model.prediction": "x1"}, "model.prediction must be one of velocity"),
        ("ar_diffusion", {"model.heads": 5}, "dim 24 does not split into 5 heads"),
        ("ar_diffusion", {"model.patch": 3}, "does not divide into patches of 3 x 3"),
        ("ar_diffusion", {"pattern.window": 0}, "window of 0 frames cannot hold"),
        (
            "bidirectional",
            {"pattern.chunk": 3},
            "config.pattern.chunk is 3; in stage 0 all frames see all",
        ),
        *(
            (
                name,
                {"pattern.chunk": None},
                "config.pattern.chunk is None, with which all frames see all",
            )
            for name in ("ar_diffusion", "consistency", "ode", "dmd")
        ),
    ],
)
def test_configs_that_cannot_be(stage, fields, message):
    config = tiny_config(stage)
    config.update_from_flattened_dict(fields)
    with pytest.raises(ValueError, match=message):
        stages.build(config)


@pytest.mark.parametrize(("group", "field"), [("model", "layer"), ("pattern", "windows")])
def test_fields_that_no_network_has(group, field):
    config = tiny_config("ar_diffusion")
    config[group][field] = 3
    with pytest.raises(ValueError, match=rf"config\.{group}: .*'{field}'"):
        stages.build(config)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("warmup", [0, 5])
def test_the_rate_rises_to_its_peak_during_the_warmup(schedule, warmup):
    config = common.optimizer("adamw", 0.125)
    config.update({"schedule": schedule, "warmup": warmup, "b1": 0.0, "b2": 0.0})
    transform = optimizer(config, 10**6)
    state = transform.init(jnp.zeros(()))
    updates = []
    for _ in range(warmup + 2):  # with b1 = b2 = 0, Adam's update of a gradient of 1 is the rate
        update, state = transform.update(jnp.ones(()), state, jnp.zeros(()))
        updates.append(-float(update))
    rising = [0.125 * step / warmup for step in range(warmup)]
    np.testing.assert_allclose(updates, [*rising, 0.125, 0.125], rtol=1e-5)


def test_clips_of_floats_are_latents_already():
    video = np.array([0, 255], np.uint8).reshape(1, 2, 1, 1, 1)
    latents, condition = unpack({"video": jnp.asarray(video), "actions": jnp.zeros((1, 2), int)})
    np.testing.assert_array_equal(latents.ravel(), [-1, 1])
    assert set(condition) == {"actions"}
    np.testing.assert_array_equal(unpack({"video": 3 * latents})[0], 3 * latents)


def test_consistency_loss_is_its_equation():
    """With linear fields every term is known; at the last pair the target is the solver's own."""
    net = tiny.network()
    x0, noise = tiny.latents(net, 4), tiny.latents(net, 4, seed=1)
    grid = jnp.asarray(flow.grid(4, 3.0))
    index = jnp.array([[0, 1, 2, 3]] * 2)
    sigma, sigma_next = grid[index], grid[index + 1]
    field = lambda weight: lambda x, s: weight * x + flow.expand(s, x)
    value = consistency.loss(field(1.0), field(2.0), field(3.0), x0, noise, index, grid)
    a, b = flow.expand(sigma, x0), flow.expand(sigma_next, x0)
    x = (1 - a) * x0 + a * noise
    x_next = x - (a - b) * (3 * x + a)
    expected = (x - a * (x + a)) - (x_next - b * (2 * x_next + b))
    tiny.close(value, jnp.mean(expected**2, (2, 3, 4)))
    last = flow.euler_step(x, field(3.0)(x, sigma), sigma, sigma_next)[:, 3]
    got = consistency.target(field(2.0), field(3.0), x, sigma, sigma_next, "euler")[:, 3]
    np.testing.assert_array_equal(got, last)


def test_ode_trajectory_ends_at_the_data_for_a_straight_flow():
    x0, noise = tiny.latents(tiny.network(), 3), tiny.latents(tiny.network(), 3, seed=1)
    path = ode.trajectory(lambda x, s: noise - x0, noise, jnp.asarray(flow.grid(5, 3.0)))
    assert path.shape == (6, *x0.shape)
    tiny.close(path[-1], x0)
    np.testing.assert_array_equal(path[0], noise)


def test_dmd_gradient_points_from_the_student_to_the_data():
    """Real and fake at rest give no gradient; a fake of larger x0 pushes x down."""
    x = tiny.latents(tiny.network(), 3)
    noise, sigma = tiny.latents(tiny.network(), 3, seed=1), jnp.full((2, 3), 0.5)
    at = lambda target: lambda x_sigma, s: (x_sigma - target) / flow.expand(s, x_sigma)
    np.testing.assert_array_equal(dmd.gradient(at(x - 1), at(x - 1), x, noise, sigma), 0)
    g = dmd.gradient(at(x - 2), at(x - 1), x, noise, sigma)
    tiny.close(g, jnp.full_like(g, 0.5), 1e-4)  # (1) / mean |2|
    value, slope = jax.value_and_grad(lambda x: dmd.loss(x, g).sum())(x)
    tiny.close(slope, g / np.prod(x.shape[2:]))
    assert value == pytest.approx(0.5 * 0.25 * 6, rel=1e-4)


def test_dmd_gradient_leaves_out_frames_that_are_held():
    """A given frame has no gradient, and does not count in the mean that the others are divided by.

    At sigma 0 every x0 is x itself; elsewhere |x - x0_real| is 2 and x0_fake - x0_real is 1.
    """
    x, noise = tiny.latents(tiny.network(), 3), tiny.latents(tiny.network(), 3, seed=1)
    sigma = jnp.full((2, 3), 0.5).at[:, 0].set(0.0)
    at = lambda target: lambda x_sigma, s: flow.to_velocity(x_sigma, target, s)
    g = dmd.gradient(at(x - 2), at(x - 1), x, noise, sigma)
    np.testing.assert_array_equal(g[:, 0], 0)
    tiny.close(g[:, 1:], jnp.full_like(g[:, 1:], 0.5))


def test_a_resampled_history(monkeypatch):
    """All chunks but the first are what the model makes of them, at noise and levels of their own.

    With the field (x - (3 - sigma)) / sigma it makes 3 - sigma of anything.
    """
    network, calls = tiny.network(Pattern(chunk=3, first_chunk=1)), []
    clean, condition = jnp.zeros((256, 7, 1, 1, 1)), {"actions": jnp.zeros((256, 7), jnp.int32)}

    def teacher_forced(self, *args):
        def field(x, sigma):
            s = flow.expand(sigma, x)
            calls.append((*args, x / s))
            return (x - (3 - s)) / s

        return field

    monkeypatch.setattr(Network, "teacher_forced", teacher_forced)
    with jax.disable_jit():
        history = resample(
            jax.random.key(0), network, "params", clean, condition, 1.0, (0.25, 0.75)
        )
    assert calls[0][0] == "params" and calls[0][1] is clean and calls[0][2] is condition
    noise = np.asarray(calls[0][3])
    assert abs(np.std(noise) - 1) < 0.1 and np.unique(noise).size == noise.size
    made = np.asarray(history)[..., 0, 0, 0]
    np.testing.assert_array_equal(made[:, 0], 0)
    np.testing.assert_allclose(made[:, 1:4], made[:, 1:2].repeat(3, 1), rtol=1e-6)
    np.testing.assert_allclose(made[:, 4:], made[:, 4:5].repeat(3, 1), rtol=1e-6)
    levels = 3 - made[:, [1, 4]]
    assert np.all((levels > 0.25) & (levels < 0.75)) and np.unique(levels).size > 256
    assert abs(np.mean(levels) - 0.5) < 5 * 0.5 / np.sqrt(12 * 512)


def test_how_often_a_history_is_resampled():
    network, clean = tiny.network(), tiny.latents(tiny.network(), 3)
    condition, params = {"actions": jnp.zeros(clean.shape[:2], jnp.int32)}, tiny.params(network)

    def changed(rate, seeds=400):
        made = lambda rng: resample(rng, network, params, clean, condition, rate, (0.3, 0.8))
        history = jax.jit(jax.vmap(made))(jax.random.split(jax.random.key(0), seeds))
        return np.any(history != clean, axis=(3, 4, 5))  # [seeds, B, F]

    quarter = changed(0.25)
    assert not np.any(quarter[:, :, 0])
    assert np.all(quarter[:, :, 1:] == quarter[:, :1, 1:2])  # all clips and frames together
    assert abs(np.mean(quarter[:, 0, 1]) - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 400)
    assert not np.any(changed(0.0, 9)) and np.all(changed(1.0, 9)[:, :, 1:])


def test_stage_3_from_noise_with_a_longer_first_chunk():
    """The first chunk is rolled out, scored and replayed as the one that it is.

    Without rounding what it replays, though the cache of the model's rollouts is of 8 bits.
    """
    config = tiny_config("dmd", given=0, first_positions=(1000.0, 750.0, 500.0), critic_steps=1)
    config.data.frames = 5
    config.pattern.first_chunk = 3
    config.model.update({"layers": 1, "cache_dtype": "int8"})
    stage = stages.build(config)
    state = nn.meta.unbox(jax.eval_shape(stage.init, jax.random.key(0), parents(config, stage)))
    program = str(jax.make_jaxpr(stage.step)(state, batch(config), jax.random.key(0)))
    assert ":f32[" in program and ":i8[" not in program
    config.data.frames = 2
    with pytest.raises(ValueError, match="chunks of 1: the last one ends after frame 3"):
        stages.build(config)
