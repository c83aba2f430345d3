"""Runs of real stages, for what the fake one of `tests/train` cannot show."""

import shutil
from unittest import mock

import pytest

from cfpp.models.network import Network
from cfpp.train import items, jobs, samples, stored
from configs import common, stage0, stage1
from tests import tiny
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
    params = tiny.params(Network.create(config.model, config.pattern))
    written = mock.Mock()
    samples.draw(config, mock.Mock(ema=params), 1, written, folder / config.stage)
    assert (folder / config.stage / "samples/000001.mp4").exists()
    assert written.write_images.called


def test_a_stage_goes_on_without_its_parents_and_where_its_data_are(folder):
    assert jobs.run(config_of(stage0, folder), folder / "parent")
    fields = {"init_from.base": str(folder / "parent"), "resample.rate": 0.0}
    assert jobs.run(config_of(stage1, folder, **fields), folder / "child")
    shutil.rmtree(folder / "parent")
    moved = shutil.copytree(folder / "data", folder / "moved/data").parent
    assert jobs.run(config_of(stage1, moved, steps=2, **fields), folder / "child")
    assert items.steps(folder / "child/checkpoints") == [1, 2]
    assert stored.find(folder / "child").config.data.directory == str(moved / "data")
