import errno
import os
import pathlib
import shutil
import subprocess
import sys
import weakref
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from cfpp import export
from cfpp.errors import UserError
from cfpp.models import shapes
from cfpp.train import checkpoint, items, jobs, stored, workdirs
from tests.train import fake
from tests.train.test_loop import final_state

# Orbax leaves the tasks of a write that failed, or a read, to themselves.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir with checkpoints 8 and 12, of 12 steps."""
    workdir = tmp_path_factory.mktemp("trained")
    patches = fake.patches(dim=64)
    for patch in patches:
        patch.start()
    jobs.run(CONFIG, workdir)
    for patch in patches:
        patch.stop()
    return workdir


CONFIG = fake.config(model={"dim": 64})


@pytest.fixture
def workdir(trained, tmp_path):
    """A copy of it, to be spoiled."""
    return pathlib.Path(shutil.copytree(trained, tmp_path / "workdir"))


def restore(workdir):
    with fake.patches(dim=64)[2]:
        return final_state(workdir, CONFIG)


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "item, file, spoil",
    [
        ("model", None, truncate),
        ("state", None, truncate),
        ("state", None, flip_a_bit),
        ("model", None, flip_a_bit),
        ("model", "manifest.ocdbt", os.remove),
        ("data", "metadata", truncate),
        ("data", "metadata", lambda path: path.write_text('{"next_index": 11}')),
        ("data", "metadata", lambda path: path.write_text('{"next_index": "x"}')),
        (".", "state", shutil.rmtree),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(workdir, trained, caplog, item, file, spoil):
    folder = workdir / "checkpoints" / "12" / item
    spoil(folder / file if file else largest_file(folder))
    restored, position = restore(workdir)
    assert restored.step == 8 and position == {"next_index": 8}
    (warning,) = [r.getMessage() for r in caplog.records if "passing over" in r.getMessage()]
    assert "\n" not in warning and str(workdir / "checkpoints" / "12") in warning
    assert (workdir / "checkpoints" / "damaged_12_1").is_dir()

    with fake.patches(dim=64)[2]:
        jobs.run(CONFIG, workdir)  # saves step 12 again
    assert items.steps(workdir / "checkpoints") == [8, 12]
    jax.tree.map(np.testing.assert_array_equal, restore(workdir), restore(trained))


def test_when_nothing_is_intact_training_does_not_start_anew(workdir):
    for step in (8, 12):
        truncate(largest_file(workdir / "checkpoints" / str(step) / "model"))
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read .*; move this folder"):
        restore(workdir)
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read"):
        stored.find(workdir).load()
    assert items.steps(workdir / "checkpoints") == [8, 12]


@pytest.mark.parametrize(
    "fault",
    [
        MemoryError(),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"),
        ValueError("UNAVAILABLE: error reading the bucket"),
        PermissionError("not yours"),
        fake.TensorFlowError(14, "the service is not there"),
        fake.TensorFlowError(2, "libcurl code 6: could not resolve the host"),
    ],
)
def test_what_cannot_be_read_now_is_not_damaged(workdir, trained, fault):
    """A run does not go back to an older checkpoint, nor is told to move this one away."""
    with mock.patch.object(items, "read", side_effect=fault):
        with pytest.raises(UserError, match=r"a checkpoint cannot be read now: .* may be whole"):
            restore(workdir)
        assert not checkpoint.is_finished(workdir, 12)
    assert items.steps(workdir / "checkpoints") == [8, 12]
    jax.tree.map(np.testing.assert_array_equal, restore(workdir), restore(trained))


def test_loading_a_model_passes_damage_over_and_changes_nothing(workdir):
    truncate(largest_file(workdir / "checkpoints" / "12" / "model"))
    params = stored.find(workdir).load()
    shutil.rmtree(workdir / "checkpoints" / "12")
    np.testing.assert_array_equal(params["kernel"], restore(workdir)[0].ema["kernel"])


def test_what_was_read_of_a_damaged_checkpoint_is_let_go(tmp_path):
    """It may fill half of a device's memory."""
    for step in (1, 2):
        (tmp_path / str(step)).mkdir()
    read_before = []

    def read(path):
        assert all(reference() is None for reference in read_before)
        array = np.zeros(3)
        read_before.append(weakref.ref(array))
        if path.name == "2":
            raise items.DamageError("cut off")
        return array

    assert items.newest_intact(epath.Path(tmp_path), [1, 2], read)[0] == 1


def test_saving_asks_nobody_whether_the_job_is_to_end(tmp_path):
    """The loop asks JAX, which counts the questions."""
    with mock.patch("jax.experimental.multihost_utils.reached_preemption_sync_point") as asked:
        jobs.run(fake.config(), tmp_path)
    assert not asked.called


def test_a_half_written_checkpoint_does_not_count(workdir, caplog):
    checkpoints = workdir / "checkpoints"
    (checkpoints / "12").rename(checkpoints / "12.orbax-checkpoint-tmp")
    assert restore(workdir)[0].step == 8
    assert "its writing was interrupted" in caplog.text


def test_a_checkpoint_of_another_model_is_refused(workdir):
    changed = (workdir / "config.json").read_text().replace('"dim": 64', '"dim": 16')
    (workdir / "config.json").write_text(changed)
    with mock.patch.object(fake, "DIM", [16]), pytest.raises(UserError) as error:
        jobs.run(fake.config(model={"dim": 16}, steps=13), workdir)
    assert "parameter bias is float32[64] there and float32[16] in this" in str(error.value)
    assert str(workdir / "checkpoints" / "12") in str(error.value)
    assert items.steps(workdir / "checkpoints") == [8, 12]


@pytest.mark.parametrize(
    "found, message",
    [
        ({"b": (2, 3)}, "parameter a is absent there and float32[1] in"),
        ({"a": (1,), "b": (3, 2)}, "parameter b is float32[3,2] there and float32[2,3] in"),
        ({"a": (1,), "b": (2, 3), "c": ()}, "parameter c is float32[] there and absent in"),
    ],
)
def test_shapes_name_the_first_difference(found, message):
    def zeros(tree):
        return {name: np.zeros(shape, np.float32) for name, shape in tree.items()}

    with pytest.raises(UserError) as error:
        shapes.check(zeros({"a": (1,), "b": (2, 3)}), zeros(found), "the parent")
    assert message in str(error.value)


def test_export_has_the_model_and_its_config(trained, tmp_path, capsys):
    export.main([f"--workdir={trained}", f"--out={tmp_path / 'out'}"])
    assert "exported" in capsys.readouterr().out
    model = stored.find(tmp_path / "out")
    config, params = model.config, model.load()
    assert config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, params, stored.find(trained).load())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    child = fake.config(model={"dim": 64}, init_from={"teacher": str(tmp_path / "out")}, steps=1)
    with fake.patches(dim=64)[2]:
        jobs.run(child, tmp_path / "child")


def test_an_export_is_no_workdir(trained, tmp_path):
    """What is trained there would not be seen, and its configuration would tell of it."""
    stored.export(trained, tmp_path / "out")
    before = (tmp_path / "out" / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"out is an exported model; name it in config\.init_from"):
        jobs.run(CONFIG, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == before


def test_a_missing_manifest_is_told_in_one_line(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    for step in (8, 12):
        (tmp_path / f"run/checkpoints/{step}/model/manifest.ocdbt").unlink()
    program = "import sys; from cfpp.train import stored; stored.find(sys.argv[1]).load()"
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "run"], capture_output=True, text=True
    )
    lines = done.stderr.splitlines()
    assert "manifest.ocdbt is missing" in lines[-1] and "Event loop" not in done.stderr


def test_paths_may_be_relative(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained.parent)
    model = stored.find(trained.name)
    config, params = model.config, model.load()
    assert config == CONFIG
    assert stored.find(trained.name).shapes()["kernel"].shape == params["kernel"].shape
    stored.export(trained.name, os.path.relpath(tmp_path / "out"))
    monkeypatch.chdir(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params, stored.find("out").load())


def test_export_overwrites_nothing_and_damage_is_told(trained, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UserError, match="exists and is not overwritten"):
        stored.export(trained, out)
    out.rmdir()
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp/mine").touch()
    stored.export(trained, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.tmp"]
    assert (tmp_path / "out.tmp/mine").exists()
    full = OSError(errno.ENOSPC, "No space left on device")
    with mock.patch("cfpp.train.workdirs.write_config", side_effect=full), pytest.raises(UserError):
        stored.export(trained, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.tmp"]
    flip_a_bit(largest_file(out / "model"))
    with pytest.raises(UserError, match=r"is damaged .*; export it again"):
        stored.find(out).load()
    (out / "model/_METADATA").unlink()
    with pytest.raises(UserError, match=r"is damaged .*; export it again"):
        stored.find(out).shapes()


def test_a_job_of_several_stages_stands_for_its_last(trained, tmp_path):
    (tmp_path / "config.json").write_text('{"jobs": ["first", "last"]}')
    (tmp_path / "last").symlink_to(trained)
    model = stored.find(tmp_path)
    config, params = model.config, model.load()
    assert config == CONFIG and params["kernel"].shape == (64, 64)


def test_an_unfinished_run_is_told_of(workdir, caplog):
    stored.find(workdir).load()
    assert not caplog.text
    written = (workdir / "config.json").read_text()
    (workdir / "config.json").write_text(written.replace('"steps": 12', '"steps": 20'))
    stored.find(workdir).load()
    assert "is not finished: it has come to step 12 of 20" in caplog.text


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "does not exist"),
        ({"x": ""}, "has no config.json"),
        ({"config.json": '{"stage": "fake", "data": {"directory": ""}, "init_from": {}}'},
         "has no checkpoint yet"),
        ({"config.json": '{"sta'}, "config.json is damaged"),
    ],
)  # fmt: skip
def test_no_model_to_load(tmp_path, files, message):
    folder = tmp_path / "folder"
    for name, content in files.items():
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    with pytest.raises(UserError, match=message):
        stored.find(folder).load()


def test_a_job_that_has_not_come_to_its_last_stage(tmp_path):
    (tmp_path / "config.json").write_text('{"jobs": ["stage0", "stage1"]}')
    with pytest.raises(UserError, match=r"has not come to its last stage yet; .*/stage0$"):
        stored.find(tmp_path).load()


def test_configs_come_back_as_they_were(tmp_path):
    config = fake.config(data={"name": "x", "directory": "../data", "sizes": ((1, 2.0), ())})
    workdirs.claim(config, tmp_path / "job")
    read = workdirs.read_config(tmp_path / "job")
    assert read.data.sizes == ((1, 2.0), ())
    assert read.data.directory == str(tmp_path / "data")
    assert read == workdirs.resolve(config, tmp_path / "job")


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    saved, original = [], ocp.CheckpointManager.save

    def save(self, step, *args, **kwargs):
        if saved:
            raise OSError(errno.ENOSPC, "No space left on device")
        saved.append(step)
        return original(self, step, *args, **kwargs)

    monkeypatch.setattr(ocp.CheckpointManager, "save", save)
    with pytest.raises(UserError) as error:
        jobs.run(fake.config(keep=1), tmp_path)
    assert "the disk is full" in str(error.value) and "\n" not in str(error.value)
    assert items.steps(tmp_path / "checkpoints") == [4]


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1600k", "tmpfs", disk]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can make a small disk")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.parametrize("foreseen", [True, False])
def test_a_disk_that_fills_up_keeps_the_last_checkpoint(
    small_disk, tmp_path, monkeypatch, foreseen
):
    if not foreseen:  # somebody else fills it while the checkpoint is being written
        monkeypatch.setattr(items, "check_room", lambda directory, tree: None)
    config = fake.config(keep=1, model={"dim": 256})  # a checkpoint is a good megabyte
    with fake.patches(dim=256)[2]:
        with pytest.raises(UserError) as error:
            jobs.run(config, small_disk / "run")
        assert "the disk is full; the last complete one is of step 4" in str(error.value)
        remount = ["mount", "-o", "remount,size=100m", small_disk]
        subprocess.run(remount, check=True)
        assert jobs.run(config, small_disk / "run")
        assert jobs.run(config, tmp_path / "undisturbed")
        a, b = (final_state(w, config) for w in (small_disk / "run", tmp_path / "undisturbed"))
    jax.tree.map(np.testing.assert_array_equal, a, b)
