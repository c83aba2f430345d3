"""What docs/data.md tells a reader to write is a dataset, and its command trains on it."""

import pathlib
import re

import numpy as np
import pytest

from cfpp import evaluate, media
from cfpp.data import pipeline, sources
from cfpp.errors import UserError
from cfpp.train import checks
from configs import quickstart

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


def test_own_videos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_videos(tmp_path)
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(program.replace("/data/tfds", str(tmp_path)), {})
    (command,) = re.findall(r"```\n(python -m cfpp.main.*?)python", PAGE, re.DOTALL)
    (variant,) = re.findall(r"--config=configs/quickstart.py:(\w+)", command)
    options = dict(re.findall(r"--config\.(\S+)=(\S+)", command))
    options = {name: int(value) if value.isdigit() else value for name, value in options.items()}

    config = quickstart.get_config(variant)
    config.update_from_flattened_dict(options | {"data.directory": str(tmp_path)})
    for job in config.jobs:
        stage = checks.check(config[job])
        checks.check_parents(config[job], stage, lambda path: config[path.removeprefix("../")])
    sources.prepare(config.stage3.data)
    batch = next(pipeline.train_batches(config.stage0.data, 2, seed=0))
    assert batch["video"].shape == (2, 8, 64, 96, 3)
    assert 25 < batch["video"].min() and batch["video"].max() < 45  # as it was written, about
    with pytest.raises(UserError, match=r"my_game has 3 clips of 13 frames, but 128 are asked for"):
        evaluate.check_clips(config.evaluate, config.stage0.data)
