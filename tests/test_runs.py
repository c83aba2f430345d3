"""Runs of real stages, for what the fake one of `tests/train` cannot show."""

import shutil

import jax
import numpy as np
import pytest

from cfpp.train import jobs, stored
from configs import common, stage0, stage1, stage2
from tests.data.test_sources import prepare_plays


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Small videos, each with its actions and a text."""
    folder = tmp_path_factory.mktemp("real")
    prepare_plays(folder / "data", train=4, test=4)
    return folder


def config_of(stage, folder, **fields):
    config = stage.get_config("smoke")
    config.steps, config.batch_size, config.sample_every = 1, 2, 0
    config.optimizer = common.optimizer("adamw", 1e-3)  # compiles faster
    config.data.update(
        {
            "name": "tfds:plays", "directory": str(folder / "data"), "height": 8, "width": 16,
            "num_actions": 3, "video_feature": "clip", "action_feature": "button",
        }
    )  # fmt: skip
    config.model.update({"dim": 24, "ffn_dim": 32, "heads": 2})
    config.update_from_flattened_dict(fields)
    return config.lock()


@pytest.mark.parametrize("stage", [stage0, stage1])
def test_samples_are_told_their_texts(folder, stage):
    texts = {"data.text_feature": "words", "data.text_tokens": 3, "data.text_dim": 7}
    config = config_of(stage, folder, sample_every=1, **texts)
    assert jobs.run(config, folder / config.stage)
    assert (folder / config.stage / "samples/000001.png").exists()


def test_a_stage_goes_on_without_its_parents_and_where_its_data_are(folder):
    assert jobs.run(config_of(stage1, folder), folder / "teacher")
    fields = {"init_from.teacher": str(folder / "teacher"), "grid_doublings": 0}
    for name, steps in (("once", 2), ("twice", 1)):
        assert jobs.run(config_of(stage2, folder, steps=steps, **fields), folder / name)
    shutil.rmtree(folder / "teacher")
    moved = shutil.copytree(folder / "data", folder / "moved/data").parent
    assert jobs.run(config_of(stage2, moved, steps=2, **fields), folder / "twice")
    once, twice = (stored.find(folder / name).load() for name in ("once", "twice"))
    jax.tree.map(np.testing.assert_array_equal, once, twice)
    assert stored.find(folder / "twice").config.data.directory == str(moved / "data")
