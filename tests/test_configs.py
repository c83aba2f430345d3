"""The configurations, those at Wan's size too, as far as shapes tell."""

import dataclasses
import importlib
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import pytest

from cfpp import evaluate, stages
from cfpp.data import pipeline
from cfpp.errors import UserError
from cfpp.models.network import Network
from cfpp.rollout import generate
from cfpp.train import checks, jobs, program
from configs import quickstart, stage0, stage1

STAGES = ("stage0", "stage1", "stage2", "stage2_ode", "stage3")
WAN_1_3B, WAN_14B = 1_418_996_800, 14_288_491_584  # parameters of the published weights


def config_of(stage, arg):
    return importlib.import_module(f"configs.{stage}").get_config(arg)


def count(model, pattern):
    shapes = jax.eval_shape(Network.create(model, pattern).init, jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def test_actions_do_not_drown_the_noise_level():
    """At first; their embeddings are added to the time's."""
    config = config_of("stage1", "arena")
    network = Network.create(config.model, config.pattern)
    params = nn.meta.unbox(jax.jit(network.init)(jax.random.key(0)))
    sigma = jnp.linspace(0, 1, 13)
    time = network.dit.apply({"params": params}, sigma, method="embed_time")
    actions = params["action"]["embedding"]
    assert 4 * actions.std(0).mean() < time.std(0).mean()


@pytest.mark.parametrize("stage", STAGES)
def test_wan(stage):
    config = config_of(stage, "wan_1_3b")
    checks.validate(config)
    built = checks.build_stage(config)
    checks.check_pattern(config)
    assert count(config.model, config.pattern) == WAN_1_3B
    shapes = pipeline.batch_shapes(config)
    assert shapes.keys() == {"video", "text"}
    assert shapes["video"].shape == (64, 21, 60, 104, 16)
    assert shapes["text"].shape == (64, 512, 4096)
    assert Network.create(config.model, config.pattern).dit.tokens == 1560
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay) == (2e-6, 0.01)
    assert (config.optimizer.clip, config.batch_size) == (10.0, 64)
    # The average of stage 2 gives its target; stages 1 and 2' are published without any.
    averages = {"stage0": (0.99, 0), "stage2": (0.99, 0), "stage3": (0.99, 200 / 5)}
    assert (config.ema.decay, config.ema.start) == averages.get(stage, (0.0, 0))
    published = {"stage1": 20_000, "stage2": 5000, "stage2_ode": 5000, "stage3": 1000 / 5}
    assert config.steps == published.get(stage, config.steps)
    guidance = {"stage2": 3.0, "stage2_ode": 6.0, "stage3": 4.0}  # v_uncond + w (v_cond - v_uncond)
    assert config.get("guidance", 1.0) == guidance.get(stage, 1.0)
    assert config.get("critic_steps", 5) == 5
    for role, parent in built.parents.items():
        assert config.init_from[role] or not parent.required


@pytest.mark.parametrize("stage", ["stage2", "stage3"])
def test_wan_takes_four_steps_in_chunks(stage):
    by_frame, by_chunk = (config_of(stage, f"wan_1_3b,chunk={size}") for size in (1, 3))
    assert by_frame.positions == (1000, 500)
    assert by_chunk.positions == by_frame.first_positions == (1000, 750, 500, 250)


def test_the_teacher_of_stage_3_may_be_larger():
    config = config_of("stage3", "wan_1_3b,teacher=14b")
    stage = checks.build_stage(config)
    assert count(stage.parents["real"].model, config.pattern) == WAN_14B
    assert count(config.model, config.pattern) == WAN_1_3B
    config.init_from.critic = ""
    with pytest.raises(UserError, match="critic cannot start from a real score of another model"):
        checks.build_stage(config)


@pytest.mark.parametrize(
    ("stage", "arg", "message"),
    [
        ("stage1", "wan_14b", "'wan_14b' is none of arena, atari, wan_1_3b"),
        ("stage1", "wan_1_3b,smoke", "'smoke' has no wan_1_3b; take arena or atari"),
        ("stage1", "wan_1_3b,teacher=14b", "'teacher=14b' is none of"),
        ("stage3", "teacher=14b", "'teacher=14b' needs the world wan_1_3b"),
        ("stage3", "wan_1_3b,teacher=5b", "smoke, chunk=N, teacher=14b"),
    ],
)
def test_arguments_that_cannot_be(stage, arg, message):
    with pytest.raises(ValueError, match=message):
        config_of(stage, arg)


def first_state(config, stage):
    """The shapes of a stage's first state, from parents of the right shapes."""
    parents = program.parent_shapes(stage, config)
    return nn.meta.unbox(jax.eval_shape(stage.init, jax.random.key(0), parents))


@pytest.mark.parametrize("variant", quickstart.STEPS)
def test_every_stage_of_every_quickstart_can_be_built(variant):
    config = quickstart.get_config(variant).copy_and_resolve_references()
    for name in config.jobs:
        stage = checks.check(config[name])
        checks.check_parents(config[name], stage, lambda path: config[path.removeprefix("../")])
        state = first_state(config[name], stage)
        assert jax.tree.structure(state.ema) == jax.tree.structure(state.params["model"])
    evaluate.check(config.evaluate, config.stage1.data)


def test_the_quickstart_is_evaluated_as_any_stage_is():
    settings = evaluate.Settings()
    assert quickstart.get_config().evaluate.to_dict() == dataclasses.asdict(settings)


@pytest.mark.parametrize("arg", ["arena,smoke", "atari,smoke", "atari,smoke,chunk=3"])
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_a_miniature(stage, arg):
    config = config_of(stage, arg)
    checks.check(config)
    assert count(config.model, config.pattern) < 500_000


@pytest.mark.parametrize("arg", ["", "wan_1_3b"])
@pytest.mark.parametrize("stage", STAGES)
def test_every_field_is_read(stage, arg, monkeypatch):
    """By the stage or by what generates from its model, so that none can be set in vain."""
    config = config_of(stage, arg)
    by_the_loop = {"seed", "log_every", "save_every", "sample_every", "keep", "mesh"}
    # What the data, the model and the pattern are made of is read whole.
    nested = {"optimizer", "critic_optimizer", "ema", "resample"}
    groups = {"config": config} | {name: config[name] for name in nested & {*config}}
    known = {(id(group), field) for group in groups.values() for field in group}
    read, get = set(), ml_collections.ConfigDict.__getitem__

    def noting(group, field):
        read.add((id(group), field))
        return get(group, field)

    monkeypatch.setattr(ml_collections.ConfigDict, "__getitem__", noting)
    stage = stages.build(config)
    state, batch = first_state(config, stage), pipeline.batch_shapes(config)
    jax.eval_shape(stage.step, state, batch, jax.random.key(0))
    if config.stage != "bidirectional":
        generate.for_stage(Network.create(config.model, config.pattern), config)
    assert {field for _, field in known - read} <= by_the_loop


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model.patch", 0, "model.patch is 0; it must be at least 1"),
        ("model.dim", 0, "model.dim is 0; it must be at least 1"),
        ("model.heads", -1, "model.heads is -1; it must be at least 1"),
        ("model.ffn_dim", 0, "model.ffn_dim is 0; it must be at least 1"),
        ("model.layers", -2, "model.layers is -2; it must be at least 1"),
        ("model.text_dim", 8, "config.data.text_dim is 8, but arena gives RGB pixels and no text"),
        ("data.text_tokens", 5, "config.data.text_tokens is 5, but arena gives RGB pixels"),
        ("data.latents", True, "config.data.latents is True, but arena gives RGB pixels"),
        ("model.channels", 4, "config.data.channels is 4, but arena gives RGB pixels"),
        ("data.frames", 65, "config.data.frames is 65, but episodes have 64 frames"),
        ("mesh.data", 3, "it does not multiply to"),
        ("pattern.first_chunk", 0, "config.pattern: the first chunk has at least 1 frame, got 0"),
        ("pattern.sink", -1, "config.pattern: a sink has at least 0 frames, got -1"),
        ("model.dtype", "float16", "float16, in which small gradients become 0; train in bf"),
    ],
)
def test_fields_that_cannot_be(field, value, message):
    config = config_of("stage1", "")
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=message):
        checks.check(config)


def test_a_critic_takes_a_step_at_least():
    config = config_of("stage3", "")
    config.critic_steps = 0
    with pytest.raises(UserError, match=r"config\.critic_steps is 0; it must be at least 1"):
        checks.check(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"num_actions": 3},
            "action_feature is empty; .* tfds:x, or set config.data.num_actions=0",
        ),
        (
            {"text_feature": ""},
            "text_feature is empty; .* tfds:x, or set config.data.text_tokens=0",
        ),
        ({"video_feature": ""}, "video_feature is empty; name the feature of tfds:x$"),
    ],
)
def test_features_without_a_name(fields, message):
    config = config_of("stage1", "wan_1_3b")
    config.data.update({"name": "tfds:x", **fields})
    with pytest.raises(UserError, match=message):
        checks.validate(config)


@pytest.mark.parametrize("field, value", [("frames", 100), ("context", 53), ("episodes", 513)])
def test_more_held_out_clips_than_will_be_recorded(field, value):
    config = quickstart.get_config("")
    config.evaluate[field] = value
    with pytest.raises(UserError, match=r"arena is recorded with \d+ such held-out clips"):
        evaluate.check(config.evaluate, config.stage1.data)


def test_a_nameless_source_is_no_recording():
    config = stage1.get_config("wan_1_3b")
    config.data.frames = config.pattern.window = 81
    checks.validate(config)


def test_training_without_a_source_of_latents_is_told(tmp_path):
    with pytest.raises(UserError, match=r"config\.data\.name is empty"):
        jobs.run(config_of("stage1", "wan_1_3b"), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_stage_of_another_configuration_is_told():
    config = stage0.get_config("smoke")
    config.stage = "dmd"
    with pytest.raises(
        UserError, match=r"config\.real_score is missing, a field of stage dmd; start"
    ):
        checks.build_stage(config)
