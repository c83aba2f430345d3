import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfpp.data import sources
from cfpp.errors import UserError
from cfpp.stages import Parent
from cfpp.train import checkpoint, checks, items, jobs, loop, program, samples, stored, workdirs
from tests.train import crash, fake


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def logged_steps(workdir):
    return [row["step"] for row in rows(workdir)]


def final_state(workdir, config=None):
    """The last checkpoint's whole state and position in the data, as NumPy arrays."""
    config = config or fake.config()
    stage = fake.build(config)
    parents = program.parent_shapes(stage, config)
    template = jax.eval_shape(stage.init, jax.random.key(0), parents)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    template = jax.tree.map(lambda x: x.update(sharding=device), template)
    data = fake.train_batches(config.data, config.batch_size, config.seed)
    checkpoints = checkpoint.Checkpoints(workdir, config.keep)
    state = checkpoints.restore(template, data)
    checkpoints.close()
    return jax.tree.map(np.asarray, state), data.get_state()


def assert_same_run(workdir, other, config=None):
    a, b = final_state(workdir, config), final_state(other, config)
    jax.tree.map(np.testing.assert_array_equal, a[0], b[0])
    assert a[1] == b[1]
    losses = [{row["step"]: row["loss"] for row in rows(folder)} for folder in (workdir, other)]
    assert losses[0] == losses[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The workdir of an undisturbed run."""
    workdir = tmp_path_factory.mktemp("finished")
    patches = fake.patches()
    for patch in patches:
        patch.start()
    assert jobs.run(fake.config(), workdir)
    for patch in patches:
        patch.stop()
    return workdir


def test_a_run_leaves_checkpoints_metrics_and_its_config(finished):
    assert items.steps(finished / "checkpoints") == [8, 12]  # keep = 2
    assert logged_steps(finished) == [2, 4, 6, 8, 10, 12]
    assert {"step", "loss", "steps_per_second"} <= rows(finished)[0].keys()
    model = stored.find(finished)
    config, params = model.config, model.load()
    assert config == fake.config()
    np.testing.assert_array_equal(params["kernel"], final_state(finished)[0].ema["kernel"])


def test_logged_metrics_are_means_over_the_steps_between(finished, tmp_path):
    jobs.run(fake.config(log_every=1), tmp_path)
    single = [row["loss"] for row in rows(tmp_path)]
    means = np.reshape(single, (-1, 2)).mean(axis=1)
    np.testing.assert_allclose([row["loss"] for row in rows(finished)], means, rtol=1e-6)


def test_a_finished_run_returns_at_once(finished, capsys):
    with mock.patch("cfpp.data.sources.prepare", side_effect=AssertionError):
        assert jobs.run(fake.config(), finished)
    assert "finished, all 12 steps" in capsys.readouterr().out


def test_a_longer_run_goes_on_to_the_same_bits(tmp_path, caplog):
    """But for what depends on its length, as is told: the fake stage has no such rate."""
    assert jobs.run(fake.config(steps=7), tmp_path / "once")
    assert jobs.run(fake.config(steps=5, log_every=1), tmp_path / "twice")
    assert "goes on to" not in caplog.text
    assert jobs.run(fake.config(steps=7), tmp_path / "twice")
    assert "twice was made for 5 steps and goes on to 7: its rate" in caplog.text
    assert caplog.text.count("goes on to") == 1
    a, b = final_state(tmp_path / "once"), final_state(tmp_path / "twice")
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_sigterm_saves_and_the_next_start_continues(finished, tmp_path, capsys):
    original = fake.train_batches

    def terminating(*args):
        data = original(*args)
        data_next = data.__class__.__next__

        class Terminating(data.__class__):
            def __next__(self):
                batch = data_next(self)
                if self.get_state() == {"next_index": 5}:
                    os.kill(os.getpid(), signal.SIGTERM)
                return batch

        data.__class__ = Terminating
        return data

    with mock.patch("cfpp.data.pipeline.train_batches", terminating):
        assert not jobs.run(fake.config(), tmp_path)
    out = capsys.readouterr().out
    assert "interrupted at step 5, saved; run the same command to continue" in out
    assert items.steps(tmp_path / "checkpoints") == [4, 5]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert jobs.run(fake.config(), tmp_path)
    assert "continuing from step 5" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, final_state(tmp_path), final_state(finished))


def test_sigterm_while_the_last_step_is_saved_is_heeded(tmp_path, capsys):
    """In a job of several stages, no other stage begins."""
    wait = checkpoint.Checkpoints.wait

    def terminated(self):
        os.kill(os.getpid(), signal.SIGTERM)
        wait(self)

    with mock.patch.object(checkpoint.Checkpoints, "wait", terminated):
        assert not jobs.run(fake.config(), tmp_path)
    assert "interrupted at step 12, saved; run the same command" in capsys.readouterr().out
    assert jobs.run(fake.config(), tmp_path)
    assert "finished, all 12 steps" in capsys.readouterr().out


def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path):
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    command = [sys.executable, "-m", "tests.train.crash", killed, undisturbed, "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("killed after") == crash.KILLS
    assert done.stdout.count(" 1 unfinished") >= 2  # killed while saving
    with fake.patches(crash.DIM)[2]:
        assert_same_run(killed, undisturbed, fake.config(**crash.CHANGES))


def test_rows_after_the_checkpoint_are_dropped(finished, tmp_path):
    jobs.run(fake.config(steps=4), tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 0.0}\n{"step": 8, "lo')
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\xfe")  # what a disk made of it
    jobs.run(fake.config(), tmp_path)
    assert logged_steps(tmp_path) == [2, 4, 6, 8, 10, 12]
    assert_same_run(tmp_path, finished)


@pytest.mark.parametrize("fault, what", [("bad_loss_at", "loss"), ("bad_state_at", "state")])
def test_divergence_stops_and_keeps_the_last_good_checkpoint(tmp_path, fault, what):
    step = 7 if what == "loss" else 8  # a ruined state is seen when it would be saved
    with pytest.raises(UserError) as error:
        jobs.run(fake.config(**{fault: step}), tmp_path)
    assert f"the {what} is not finite at step {step}" in str(error.value)
    assert str(tmp_path / "checkpoints" / "4") in str(error.value)
    assert items.steps(tmp_path / "checkpoints") == [4]


def test_a_full_disk_does_not_hide_a_divergence(tmp_path):
    checkpoints = mock.Mock(directory=tmp_path)
    checkpoints.wait.side_effect = UserError("the disk is full")
    told = str(loop.diverged("loss", 7, checkpoints))
    assert told.startswith("the loss is not finite at step 7; there is no checkpoint yet; lower")
    assert told.endswith("; besides, the disk is full")


def test_divergence_is_seen_before_saving_though_not_logged(tmp_path):
    with pytest.raises(UserError, match="the loss is not finite at step 3"):
        jobs.run(fake.config(bad_loss_at=3, log_every=100), tmp_path)
    assert items.steps(tmp_path / "checkpoints") == []


def test_a_workdir_of_another_config_is_refused(finished):
    with pytest.raises(UserError, match=r"another configuration: model.dim was 8 and is now 16"):
        jobs.run(fake.config(model={"dim": 16}), finished)
    with pytest.raises(UserError, match=r"made for 12 steps and config.steps is now 3"):
        jobs.run(fake.config(steps=3), finished)
    assert jobs.run(fake.config(mesh={"data": 1}), finished)  # the mesh may be another
    assert jobs.run(fake.config(model={"attention": "xla", "remat": "full"}), finished)
    assert jobs.run(fake.config(accumulate=2), finished)  # where memory has become short
    without = fake.config().copy_and_resolve_references().unlock()
    del without.bad_loss_at
    with pytest.raises(UserError, match="bad_loss_at was -1 and is now absent"):
        jobs.run(without, finished)


def test_another_stage_is_told_as_such(finished):
    other = fake.config(stage="another").unlock()
    del other.bad_loss_at
    with pytest.raises(UserError, match='stage was "fake" and is now "another"'):
        workdirs.check(other, finished)


def test_parents_that_have_moved_may_be_named_anew(finished, tmp_path):
    parent = shutil.copytree(finished, tmp_path / "parent")
    config = lambda path, **more: fake.config(init_from={"teacher": str(path)}, **more)
    jobs.run(config(parent), tmp_path / "run")
    with pytest.raises(UserError, match=r"init_from\.teacher was "):
        jobs.run(config(finished), tmp_path / "run")
    parent.rename(tmp_path / "moved")
    assert jobs.run(config(tmp_path / "moved", steps=13), tmp_path / "run")
    assert workdirs.read_config(tmp_path / "run").init_from.teacher == str(tmp_path / "moved")


def test_two_jobs_do_not_train_in_one_workdir(tmp_path):
    with workdirs.alone(tmp_path), pytest.raises(UserError, match="another job is training in /"):
        jobs.run(fake.config(steps=1), tmp_path)
    assert jobs.run(fake.config(steps=1), tmp_path)
    with workdirs.alone(tmp_path), pytest.raises(UserError, match="another job is training in /"):
        jobs.run(fake.config(steps=2), tmp_path)
    assert workdirs.read_config(tmp_path).steps == 1  # still that of the job that holds it


def test_checkpoints_without_a_config_are_not_overwritten(tmp_path):
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    with pytest.raises(UserError, match=r"has checkpoints but no config\.json"):
        jobs.run(fake.config(), tmp_path)


@pytest.mark.parametrize(
    "name, value, wanted",
    [("steps", 0, "at least 1"), ("batch_size", -4, "at least 1"), ("log_every", 0, "at least 1"),
     ("save_every", 0, "at least 1"), ("sample_every", -1, "at least 0"), ("keep", 0, "at least 1"),
     ("steps", 10**20, "from 1 to"), ("seed", -1, "at least 0"), ("seed", 10**20, "from 0 to"),
     ("guidance", math.nan, "from 0.0 to 100.0"), ("ema.decay", 5.0, "from 0.0 to 0.999999"),
     ("optimizer.learning_rate", -1.0, "at least 0.0"),
     ("critic_optimizer.learning_rate", math.inf, "from 0.0 to"),
     ("optimizer.clip", 0.0, "at least 1e-06"), ("data.frames", 0, "at least 1"),
     ("data.frames", -3, "at least 1"), ("data.workers", -1, "at least 0")],
)  # fmt: skip
def test_numbers_out_of_range(tmp_path, name, value, wanted):
    changes = value
    for group in reversed(name.split(".")):
        changes = {group: changes}
    with pytest.raises(UserError) as error:
        jobs.run(fake.config(**changes), tmp_path / "run")
    assert f"config.{name} is {value}; it must be {wanted}" in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_step_is_traced_once_and_what_cannot_be_traced_leaves_no_trace(tmp_path):
    traced = []

    def build(config):
        stage = fake.build(config)

        def step(*arguments):
            traced.append(arguments)
            if config.seed:
                raise ValueError("heads of at most 128, got 160")
            return stage.step(*arguments)

        return stage._replace(step=step)

    with mock.patch("cfpp.stages.build", build):
        assert jobs.run(fake.config(), tmp_path / "run")
        assert len(traced) == 1
        with pytest.raises(UserError, match=r"^stage fake cannot be traced: heads of at most 128"):
            jobs.run(fake.config(seed=1), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_unknown_stage(tmp_path):
    with pytest.raises(UserError, match=r"config\.stage must be fake, got 'nonsense'"):
        jobs.run(fake.config(stage="nonsense"), tmp_path)


@pytest.mark.parametrize(
    "workdir, message",
    [("file/workdir", "not a folder"), ("file", "(a file is in the way|not a folder)"),
     ("/proc/workdir", "/proc/workdir: no such folder, and it cannot be made")],
)  # fmt: skip
def test_a_workdir_that_cannot_be_made(tmp_path, workdir, message):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"{message}; choose another --workdir"):
        jobs.run(fake.config(), tmp_path / workdir)


@pytest.mark.parametrize("name", ["run[1]", "back\\slash", "a]/run"])
def test_a_workdir_that_orbax_takes_for_a_pattern(finished, tmp_path, name):
    """It would train to the end, and save what nobody can read."""
    with pytest.raises(UserError, match="checkpoints cannot be kept in a folder with "):
        jobs.run(fake.config(), tmp_path / name)
    with pytest.raises(UserError, match="checkpoints cannot be kept in a folder with "):
        stored.export(finished, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_workdir_in_the_way_is_told_before_data_are_recorded(tmp_path):
    (tmp_path / "file").write_text("")
    with mock.patch.object(sources, "prepare") as prepare, pytest.raises(UserError):
        jobs.run(fake.config(), tmp_path / "file" / "workdir")
    prepare.assert_not_called()


@pytest.mark.parametrize("field", checks.FIELDS)
def test_a_configuration_that_lacks_a_field_leaves_no_trace(tmp_path, field):
    config = fake.config().copy_and_resolve_references().unlock()
    del config[field]
    with pytest.raises(UserError, match=f"config.{field} is missing; configs/common.py has what"):
        jobs.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_parents_are_what_the_stage_starts_from(finished, tmp_path):
    config = fake.config(init_from={"teacher": str(finished)}, steps=1)
    jobs.run(config, tmp_path)
    teacher = stored.find(finished).load()
    frozen = final_state(tmp_path, config)[0].frozen["teacher"]
    jax.tree.map(np.testing.assert_array_equal, frozen, teacher)


def test_a_run_that_has_begun_needs_its_parents_no_more(finished, tmp_path, caplog):
    """Nor is anything told of them again."""
    parent = shutil.copytree(finished, tmp_path / "parent")
    fields = {"init_from": {"teacher": str(parent)}}
    with mock.patch("cfpp.stages.build", asking("ar_diffusion", required=False)):
        jobs.run(fake.config(steps=7, **fields), tmp_path / "once")
        jobs.run(fake.config(steps=5, **fields), tmp_path / "twice")
        assert caplog.text.count("is a model of stage fake; ") == 2
        shutil.rmtree(parent)
        jobs.run(fake.config(steps=7, **fields), tmp_path / "twice")
    assert caplog.text.count("is a model of stage fake; ") == 2
    with pytest.raises(UserError, match=r"^config\.init_from\.teacher: .*parent does not exist"):
        jobs.run(fake.config(steps=7, **fields), tmp_path / "new")
    states = [final_state(tmp_path / name, fake.config(**fields)) for name in ("once", "twice")]
    jax.tree.map(np.testing.assert_array_equal, *states)


def asking(*stages, **fields):
    """What builds the fake stage, asking of its teacher to be of these stages, and more."""

    def build(config):
        teacher = Parent(stages, config.model, **fields)
        return fake.build(config)._replace(parents={"teacher": teacher})

    return build


def test_bad_parents(finished, tmp_path):
    def message(workdir, **changes):
        with pytest.raises(UserError) as error:
            jobs.run(fake.config(**changes), tmp_path / workdir)
        return str(error.value)

    missing = str(tmp_path / "missing")
    text = message("1", init_from={"teacher": missing})
    assert text.startswith(f"config.init_from.teacher: {missing} does not exist")
    (tmp_path / "empty").mkdir()
    text = message("2", init_from={"teacher": str(tmp_path / "empty")})
    assert "has no config.json" in text
    text = message("3", init_from={"techer": str(finished)})
    assert "config.init_from.techer is no parent of stage fake, which takes teacher" in text
    text = message("4", init_from={"teacher": str(finished)}, model={"dim": 16})
    assert text.startswith(f"config.init_from.teacher={finished} has model.dim=8; this")
    damaged = shutil.copytree(finished, tmp_path / "damaged")
    fields = json.loads((damaged / "config.json").read_text())
    del fields["model"]
    (damaged / "config.json").write_text(json.dumps(fields))
    text = message("5", init_from={"teacher": str(damaged)})
    assert "config.json is damaged, or of another version: it has no field model; restore" in text
    another = shutil.copytree(finished, tmp_path / "another")
    workdirs.write_config(fake.config(model={"dim": 16}), another)  # not that of its parameters
    text = message("6", init_from={"teacher": str(another)}, model={"dim": 16})
    assert "parameter bias is float32[8] there and float32[16] in this configuration" in text
    assert text.startswith(f"config.init_from (teacher={another}): ")
    assert not any((tmp_path / name).exists() for name in "12346")  # a mistake leaves no trace
    with mock.patch("cfpp.stages.build", asking("fake")):
        assert "config.init_from.teacher is not set" in message("5")


def test_an_unusual_parent_is_told(finished, tmp_path, caplog):
    with mock.patch("cfpp.stages.build", asking("ar_diffusion")):
        jobs.run(fake.config(init_from={"teacher": str(finished)}, steps=1), tmp_path)
    (told,) = [r.getMessage() for r in caplog.records if "starts from one of" in r.getMessage()]
    assert told.startswith(f"config.init_from.teacher={finished} is a model of stage fake; stage")
    with mock.patch("cfpp.stages.build", asking("ar_diffusion", strict=True)):
        with pytest.raises(UserError, match=r"is a model of stage fake; give one of ar_diffusion$"):
            jobs.run(fake.config(init_from={"teacher": str(finished)}), tmp_path / "strict")


def test_guidance_needs_a_model_that_was_trained_for_it(finished, tmp_path):
    def run(name, guided, **changes):
        build = asking("fake", required=False, guided=guided)
        parent = fake.config(steps=1, drop_rate=0.0)
        if not (tmp_path / "parent").exists():
            jobs.run(parent, tmp_path / "parent")
        with mock.patch("cfpp.stages.build", build):
            config = fake.config(
                steps=1, init_from={"teacher": str(tmp_path / "parent")}, **changes
            )
            jobs.run(config, tmp_path / name)

    with pytest.raises(UserError, match=r"was trained with config\.drop_rate=0 and knows no"):
        run("1", True, guidance=2.0)
    run("2", True, guidance=1.0)
    # Of a stage that guides its own model, the parent's does not matter.
    run("3", False, guidance=2.0, drop_rate=0.1)
    with pytest.raises(UserError, match=r"with config\.drop_rate=0 the model learns no"):
        run("4", False, guidance=2.0, drop_rate=0.0)


@pytest.mark.parametrize("base", [0.1, 0.0, None])
def test_a_teacher_may_know_no_condition_from_its_base(base, caplog):
    """Where the base has gone since, it may have, which is told."""
    teacher = fake.config(drop_rate=0.0, init_from={"base": "base"})

    def find(path):
        if path == "teacher":
            return teacher
        if base is None:
            raise UserError("no such folder")
        return fake.config(drop_rate=base, init_from={})

    guided = asking("fake", guided=True)(fake.config())
    child = fake.config(guidance=2.0, init_from={"teacher": "teacher"})
    told = contextlib.nullcontext()
    if base == 0.0:
        told = pytest.raises(UserError, match=r"was trained with config\.drop_rate=0 and knows no")
    with told:
        checks.check_parents(child, guided, find)
    assert ("whether its base, base, was too is not known" in caplog.text) == (base is None)


def test_a_field_that_a_parent_leaves_out_has_the_default():
    def check(base):
        changes = {"init_from": {"teacher": "somewhere"}, "model": {"rotary_base": base}}
        child = fake.config(**changes)
        checks.check_parents(child, fake.build(child), lambda path: parent)

    parent = fake.config(model={"gate_init": 0.0}).unlock()
    del parent.model.rotary_base
    check(10000.0)
    with pytest.raises(UserError, match=r"has model\.rotary_base=10000\.0; .* should have 100\.0$"):
        check(100.0)


def test_a_finished_run_whose_checkpoint_was_doubted_ends_too(tmp_path):
    """As where the model does not fit on the one device that the check reads it to."""
    jobs.run(fake.config(), tmp_path)
    with mock.patch.object(checkpoint, "is_finished", return_value=False):
        assert jobs.run(fake.config(), tmp_path)


def test_a_finished_run_needs_its_data_no_more(tmp_path):
    jobs.run(fake.config(), tmp_path)
    gone = UserError("recording needs the package ale-py")
    with mock.patch.object(sources, "check", side_effect=gone):
        assert jobs.run(fake.config(), tmp_path)
        with pytest.raises(UserError, match="ale-py"):
            jobs.run(fake.config(steps=13), tmp_path)


def test_a_profile_without_tensorboard_is_refused_before_anything_runs(tmp_path):
    with (
        mock.patch("importlib.util.find_spec", return_value=None),
        pytest.raises(UserError, match="--profile needs TensorBoard; pip install"),
    ):
        jobs.run(fake.config(), tmp_path / "run", profile=True)
    assert not (tmp_path / "run").exists()


def test_a_profile_of_too_few_steps_is_none(tmp_path, caplog):
    jobs.run(fake.config(), tmp_path, profile=True)
    assert "--profile records steps 10 to 15, but only 12 are left" in caplog.text
    assert not list(tmp_path.glob("**/plugins/profile"))


def test_a_parent_of_another_pattern_is_told(finished, tmp_path, caplog):
    changes = {"init_from": {"teacher": str(finished)}, "steps": 1}
    jobs.run(fake.config(**changes), tmp_path / "same")
    jobs.run(fake.config(**changes, pattern={"first_chunk": 1}), tmp_path / "also")
    assert "config.pattern" not in caplog.text
    jobs.run(fake.config(**changes, pattern={"chunk": 3}), tmp_path / "other")
    assert re.search("trained with config.pattern {'chunk': 1, .*, not {'chunk': 3, ", caplog.text)


@pytest.mark.parametrize(
    "changes, told",
    [
        ({}, None),
        ({"sample_every": 5}, None),
        ({"pattern": {"window": 9}}, "config.pattern.window is 9, but clips of config.data.frames"),
        ({"pattern": {"chunk": 3}}, None),
        ({"pattern": {"chunk": 3}, "sample_every": 5}, "give config.pattern.first_chunk=1"),
        ({"pattern": {"chunk": 3, "first_chunk": 1}, "sample_every": 5}, None),
        ({"pattern": {"chunk": 3}, "given": 1}, "config.given is 1, and chunks of 3 begin anew"),
        ({"pattern": {"chunk": 3, "first_chunk": 1}, "given": 1}, None),
    ],
)
def test_streams_that_are_not_as_training_are_told(changes, told, caplog):
    checks.check_pattern(fake.config(**changes))
    messages = [record.getMessage() for record in caplog.records]
    assert any(told in message for message in messages) if told else not messages


def test_guidance_needs_a_condition():
    config = fake.config(guidance=2.0, data={"num_actions": 0})
    with pytest.raises(UserError, match="the model takes neither actions nor text; use guidance 1"):
        checks.validate(config)


def test_a_real_score_of_other_clips_is_told(caplog):
    base = fake.config().copy_and_resolve_references().unlock()
    base.stage = "bidirectional"
    base.pattern.chunk = None
    stage = asking("bidirectional")(fake.config())
    stage = stage._replace(parents={"real": stage.parents["teacher"]})
    for frames, told in ((8, False), (5, True)):
        caplog.clear()
        base.data.frames = frames
        checks.check_parents(fake.config(init_from={"real": "b"}), stage, lambda path: base)
        assert ("has learned clips of 5 frames, not of 8" in caplog.text) == told


def test_more_given_frames_than_a_base_was_trained_with_are_told(caplog):
    base = fake.config().copy_and_resolve_references().unlock()
    base.stage = "bidirectional"
    base.pattern.chunk = None
    stage = asking("bidirectional")(fake.config())
    for rate, given, told in ((0.5, 1, False), (0.0, 1, True), (0.5, 2, True), (0.0, 0, False)):
        caplog.clear()
        base.given_rate = rate
        child = fake.config(given=given, init_from={"teacher": "base"})
        checks.check_parents(child, stage, lambda path: base)
        assert ("given frames at most, and config.given is" in caplog.text) == told


def test_samples_that_cannot_be_drawn_are_told_before_training(tmp_path):
    with mock.patch("cfpp.data.pipeline.test_clips", side_effect=UserError("too few clips")):
        config = fake.config(sample_every=5, data={"frames": 8})
        with pytest.raises(UserError, match=r"too few clips; or set config\.sample_every=0"):
            samples.check(config)
        samples.check(fake.config(sample_every=0))
    config = fake.config(sample_every=5, pattern={"chunk": 1, "window": None})
    with pytest.raises(UserError, match=r"config\.pattern\.window is None, but sample videos"):
        jobs.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_window_without_history_is_refused():
    """It would train in silence, and make videos whose chunks know nothing of one another."""
    pattern = {"chunk": 3, "window": 4, "sink": 1}
    told = "window is 4: with a sink of 1 and chunks of 3 frames no chunk sees .* at least 5$"
    with pytest.raises(UserError, match=told):
        checks.check_pattern(fake.config(pattern=pattern))
    checks.check_pattern(fake.config(pattern=pattern | {"window": 5}))
    for changes, first in (({"chunk": 20, "window": 40}, 20), ({"first_chunk": 8, "window": 9}, 8)):
        told = f"data.frames is 8: with a first chunk of {first} frames .* at least {first + 1}$"
        with pytest.raises(UserError, match=told):
            checks.check_pattern(fake.config(data={"frames": 8}, pattern=changes))


def test_samples_are_asked_for(tmp_path):
    with mock.patch.object(samples, "check") as check, mock.patch.object(samples, "draw") as draw:
        jobs.run(fake.config(sample_every=5), tmp_path)
    assert check.called
    assert [call.args[2] for call in draw.call_args_list] == [5, 10, 12]
    with mock.patch.object(samples, "draw") as draw:
        jobs.run(fake.config(sample_every=0), tmp_path / "none")
    assert not draw.called


def test_samples_are_drawn_before_their_step_is_saved(tmp_path):
    """So a run that ends while drawing them draws them again."""

    done = []
    draw = lambda config, state, step, writer, workdir: done.append(("drawn", step))
    save = lambda self, step, *rest: done.append(("saved", step))
    with (
        mock.patch.object(samples, "check"),
        mock.patch.object(samples, "draw", draw),
        mock.patch.object(checkpoint.Checkpoints, "save", save),
    ):
        jobs.run(fake.config(steps=8, save_every=4, sample_every=4), tmp_path)
    assert done == [("drawn", 4), ("saved", 4), ("drawn", 8), ("saved", 8)]


def test_donated_buffers_do_not_reach_the_disk(tmp_path):
    """Steps go on while a checkpoint is being written: it must be of the step that it says."""
    config = fake.config(steps=6, save_every=1, keep=6, model={"dim": 512})
    with fake.patches(512)[2]:
        jobs.run(config, tmp_path)
    data = fake.train_batches(config.data, config.batch_size, config.seed)
    with fake.patches(512)[2]:
        data = fake.train_batches(config.data, config.batch_size, config.seed)
        stage, key = fake.build(config), jax.random.key(config.seed)
        state = jax.jit(stage.init)(jax.random.fold_in(key, program.INIT), {})
        step = jax.jit(stage.step)
        for number in range(6):
            batch = jax.tree.map(jnp.asarray, next(data))
            state, _ = step(state, batch, jax.random.fold_in(key, number))
            saved = items.read_model(tmp_path / "checkpoints" / str(number + 1))
            np.testing.assert_array_equal(saved["kernel"], state.ema["kernel"])
