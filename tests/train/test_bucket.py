"""Working directories on gs://: a bucket played by a folder, for etils, Orbax and TensorStore."""

import json
import os
from types import SimpleNamespace
from unittest import mock

import jax
import numpy as np
import pytest
from etils import epath
from fsspec.implementations.local import LocalFileSystem
from orbax.checkpoint._src.path import gcs_utils

from cfpp import export, media
from cfpp.errors import UserError
from cfpp.train import checkpoint, items, jobs, stored, workdirs
from tests.train import fake


class Bucket(LocalFileSystem):
    cachable = False
    root = ""

    def __init__(self):
        super().__init__(auto_mkdir=True)

    @classmethod
    def _strip_protocol(cls, path):
        path = os.fspath(path)
        assert not path.startswith("gs:") or path.startswith("gs://bucket/"), f"mangled: {path}"
        return super()._strip_protocol(path.replace("gs://bucket", cls.root))

    def glob(self, path, **options):
        return [found.replace(self.root, "bucket", 1) for found in super().glob(path, **options)]

    def open(self, path, mode="rb", **options):
        assert "a" not in mode, "an object cannot grow"
        return super().open(path, mode, **options)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The folder that plays the bucket; a mangled path ends up outside of it."""
    root, elsewhere = tmp_path / "bucket", tmp_path / "elsewhere"
    root.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(Bucket, "root", str(root))
    files = Bucket()

    def kvstore(path):
        assert path.startswith("gs://bucket/")
        return {"driver": "file", "path": path.replace("gs://bucket", str(root))}

    with (
        mock.patch("etils.epath.gpath._is_tf_installed", lambda: False),
        mock.patch.object(
            type(epath.backend.fsspec_backend), "_get_filesystem", lambda self, name: files
        ),
        mock.patch.object(gcs_utils, "get_kvstore_for_gcs", kvstore),
        mock.patch.object(
            gcs_utils, "get_bucket", lambda name: SimpleNamespace(hierarchical_namespace_enabled=0)
        ),
    ):
        yield root
    assert not list(elsewhere.iterdir())


def test_a_run_and_its_export_on_a_bucket(bucket, tmp_path, capsys):
    run = "gs://bucket/runs/a"
    with mock.patch("cfpp.train.metrics._tensorboard") as tensorboard:  # TensorFlow writes itself
        jobs.run(fake.config(steps=6), run)
        jobs.run(fake.config(), run)
    assert os.fspath(tensorboard.call_args.args[0]) == run + "/tensorboard"
    assert "continuing from step 6" in capsys.readouterr().out
    with mock.patch("cfpp.train.metrics._tensorboard"):
        jobs.run(fake.config(), tmp_path / "local")
    assert sorted(path.name for path in (bucket / "runs/a").iterdir()) == sorted(
        path.name for path in (tmp_path / "local").iterdir()
    )
    assert items.steps(run + "/checkpoints") == [8, 12]
    logged = (bucket / "runs/a/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in logged] == [2, 4, 6, 8, 10, 12]
    with pytest.raises(UserError, match="gs://bucket/runs/a was made with another configuration"):
        jobs.run(fake.config(seed=1), run)

    export.main([f"--workdir={run}", "--out=gs://bucket/models/a"])
    exported, local = (
        stored.find(path).load() for path in ("gs://bucket/models/a", tmp_path / "local")
    )
    jax.tree.map(np.testing.assert_array_equal, exported, local)
    child = fake.config(init_from={"teacher": "gs://bucket/models/a"}, steps=1)
    with mock.patch("cfpp.train.metrics._tensorboard"):
        jobs.run(child, "gs://bucket/runs/b")


def test_a_checkpoint_without_its_seal_does_not_count(bucket, capsys):
    """In a bucket nothing can be renamed: a file tells that all others are there."""
    run = "gs://bucket/runs/a"
    with mock.patch("cfpp.train.metrics._tensorboard"):
        jobs.run(fake.config(), run)
        (bucket / "runs/a/checkpoints/12/commit_success.txt").unlink()
        assert items.steps(run + "/checkpoints") == [8]
        assert not checkpoint.is_finished(run, 12)
        jobs.run(fake.config(), run)
    assert "continuing from step 8" in capsys.readouterr().out
    assert checkpoint.is_finished(run, 12)


def test_a_bucket_that_is_not_there_or_not_ours_is_told_in_a_line(tmp_path):
    for code, reason in {5: "no such folder", 7: "permission denied"}.items():
        error = fake.TensorFlowError(code, "Error executing an HTTP request")
        with mock.patch.object(type(epath.Path()), "exists", side_effect=error):
            with pytest.raises(UserError, match=f"{reason}.*; choose another --workdir"):
                workdirs.check(fake.config(), tmp_path)


def test_paths_of_a_job_relative_to_its_stages(bucket):
    config = fake.config(init_from={"teacher": "../first"}, data={"directory": "../data"})
    config = workdirs.resolve(config, "gs://bucket/job/second")
    assert config.init_from.teacher == "gs://bucket/job/first"
    assert config.data.directory == "gs://bucket/job/data"
    with pytest.raises(UserError, match=r"directory is gs://bucket/job/data, but records are read"):
        jobs.run(config, "gs://bucket/job/second")


def test_pictures_and_videos_go_there_whole(bucket, tmp_path):
    video = np.zeros((3, 16, 16, 3), np.uint8)
    for folder in ("gs://bucket/media", str(tmp_path)):
        media.write_mp4(f"{folder}/x.mp4", video)
        media.write_image(f"{folder}/x.png", video[0])
    for name in ("x.mp4", "x.png"):
        assert (bucket / "media" / name).read_bytes() == (tmp_path / name).read_bytes()
