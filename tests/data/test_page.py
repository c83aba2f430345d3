"""What docs/data.md tells a reader to write are datasets, and its commands train on them."""

import contextlib
import pathlib
import re

import jax
import numpy as np
import pytest

from cfpp import evaluate, media
from cfpp.data import pipeline, sources
from cfpp.errors import UserError
from cfpp.evaluate import __main__ as evaluation
from cfpp.rollout import __main__ as rollout_command
from cfpp.train import checks, jobs
from configs import quickstart, stage1

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "data.md").read_text()


def write_videos(folder):
    """Of another size than the dataset's, as videos are."""
    for split, lengths in {"train": (30, 40), "test": (13, 30)}.items():
        (folder / "videos" / split).mkdir(parents=True)
        for frames in lengths:
            video = np.full((frames, 80, 100, 3), frames, np.uint8)
            path = folder / "videos" / split / f"{frames}.mp4"
            media.write_mp4(path, video)
            np.save(path.with_suffix(".npy"), np.arange(frames) % 7)


def programs(folder):
    """Those of the page, which write into `folder`."""
    found = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    return [program.replace("/data/tfds", str(folder)) for program in found]


def configured(config, command, **options):
    """A configuration as a command of the page changes it, and with other `options`."""
    given = dict(re.findall(r"--config\.(\S+)=(\S+)", command))
    given = {name: int(value) if value.isdigit() else value for name, value in given.items()}
    config.update_from_flattened_dict(given | options)
    return config


def test_own_videos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_videos(tmp_path)
    exec(programs(tmp_path)[0], {})
    (command,) = re.findall(r"```\n(python -m cfpp.main[^`]*?)python", PAGE, re.DOTALL)
    (variant,) = re.findall(r"--config=configs/quickstart.py:(\w+)", command)
    config = quickstart.get_config(variant)
    configured(config, command, **{"data.directory": str(tmp_path)})
    for job in config.jobs:
        stage = checks.check(config[job])
        checks.check_parents(config[job], stage, lambda path: config[path.removeprefix("../")])
    sources.prepare(config.stage3.data)
    batch = next(pipeline.train_batches(config.stage0.data, 2, seed=0))
    assert batch["video"].shape == (2, 8, 64, 96, 3)
    assert 25 < batch["video"].min() and batch["video"].max() < 45  # as it was written, about
    with pytest.raises(UserError, match=r"my_game has 3 clips of 13 frames, but 128 are asked for"):
        evaluate.check_clips(config.evaluate, config.stage0.data)


SIZES = {"60, 104, 16": "4, 6, 5", "512, 4096": "3, 7"}


def encoded(split):
    """Of each clip's number, in all that it has."""
    for number in range({"train": 6, "test": 1}[split]):
        yield np.full((5, 4, 6, 5), number, np.float32), np.full((3, 7), number, np.float32)


def prepare(folder, monkeypatch, encoded):
    """What the page's second program writes, at smaller sizes."""
    monkeypatch.chdir(folder)
    write_videos(folder)
    videos, latents = programs(folder)
    for size, smaller in SIZES.items():
        assert size in latents
        latents = latents.replace(size, smaller)
    names = {"my_encoded": encoded}
    exec(videos, names)
    exec(latents, names)


def test_latents_and_texts(tmp_path, monkeypatch):
    prepare(tmp_path, monkeypatch, encoded)
    (command,) = re.findall(r"```\n(python -m cfpp.main --config=\S*stage1.*?)```", PAGE, re.DOTALL)
    assert "configs/stage1.py:wan_1_3b" in command
    config = configured(
        stage1.get_config("wan_1_3b"),
        command,
        **{
            "data.directory": str(tmp_path), "data.workers": 2, "data.frames": 5,
            "data.height": 4, "data.width": 6, "data.channels": 5,
            "data.text_tokens": 3, "data.text_dim": 7,
            "model.dim": 24, "model.ffn_dim": 32, "model.heads": 2, "model.layers": 1,
            "init_from.base": "", "batch_size": 8, "steps": 2,
        },
    )  # fmt: skip
    with contextlib.closing(pipeline.train_batches(config.data, 8, seed=0)) as batches:
        batch = next(batches)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(batch) == shapes(pipeline.batch_shapes(config))
    np.testing.assert_array_equal(batch["video"][:, 0, 0, 0, 0], batch["text"][:, 0, 0])
    assert jobs.run(config, str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"^tfds:my_clips gives latents \(data\.latents\), and the"):
        evaluation.main([f"--workdir={tmp_path / 'run'}"])
    np.save("text.npy", np.zeros((3, 7)))
    np.save("latent.npy", np.zeros((4, 6, 5)))
    rollouts = re.findall(r"python -m cfpp.rollout (.*clip\.npy)", PAGE)
    assert len(rollouts) == 3
    for rollout in rollouts:
        arguments = rollout.replace("runs/stage3", "run").replace("=21", "=3").split()
        rollout_command.run(rollout_command.parse([*arguments, "--steps=2"]))
        clip = np.load("clip.npy")
        assert clip.shape == (3, 4, 6, 5) and clip.dtype == np.float32


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_what_float16_does_not_hold_is_told(tmp_path, monkeypatch):
    prepare(tmp_path, monkeypatch, lambda split: [(np.full((5, 4, 6, 5), 1e5), np.zeros((3, 7)))])
    config = stage1.get_config("wan_1_3b").data
    sizes = {"frames": 5, "height": 4, "width": 6, "channels": 5, "text_tokens": 3, "text_dim": 7}
    config.update({"name": "tfds:my_clips", "directory": str(tmp_path), **sizes})
    with pytest.raises(
        UserError, match=r"^episode 0 of .*my_clips.*: 'video' has numbers that are"
    ):
        sources.prepare(config)
