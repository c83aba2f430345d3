"""The configurations at Wan's size, as far as shapes tell."""

import importlib
import math

import jax
import pytest

from cfpp import main
from cfpp.data import pipeline
from cfpp.errors import UserError
from cfpp.models.network import Network
from cfpp.train import loop

STAGES = ("stage0", "stage1", "stage2", "stage2_ode", "stage3")
WAN_1_3B, WAN_14B = 1_418_996_800, 14_288_491_584  # parameters of the published weights


def config_of(stage, arg):
    return importlib.import_module(f"configs.{stage}").get_config(arg)


def count(model, pattern):
    shapes = jax.eval_shape(Network.create(model, pattern).init, jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("stage", STAGES)
def test_wan(stage):
    config = config_of(stage, "wan_1_3b")
    loop.validate(config)
    built = loop.build_stage(config)
    assert count(config.model, config.pattern) == WAN_1_3B
    shapes = pipeline.batch_shapes(config)
    assert shapes.keys() == {"video", "text"}
    assert shapes["video"].shape == (64, 21, 60, 104, 16)
    assert shapes["text"].shape == (64, 512, 4096)
    assert Network.create(config.model, config.pattern).dit.tokens == 1560
    for role in built.required:
        assert config.init_from[role]


def test_the_teacher_of_stage_3_may_be_larger():
    config = config_of("stage3", "wan_1_3b,teacher=14b")
    stage = loop.build_stage(config)
    assert count(stage.parent_models["real"], config.pattern) == WAN_14B
    assert count(config.model, config.pattern) == WAN_1_3B
    config.init_from.critic = ""
    with pytest.raises(UserError, match="critic cannot start from a real score of another model"):
        loop.build_stage(config)


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


def test_training_without_a_source_of_latents_is_told(tmp_path):
    with pytest.raises(UserError, match=r"config\.data\.name is empty"):
        main.run(config_of("stage1", "wan_1_3b"), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
