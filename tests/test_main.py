import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
from unittest import mock

import ml_collections
import pytest

from cfpp import export, paths
from cfpp.errors import UserError
from cfpp.evaluate import __main__ as evaluation_command
from cfpp.models.network import FIELDS
from cfpp.rollout import __main__ as rollout_command
from cfpp.train import checkpoint, items, jobs, loop, stored, workdirs
from configs import quickstart
from tests.train import fake

ROOT = pathlib.Path(__file__).parent.parent
STAGE1 = "--config=configs/stage1.py"


def command(*arguments, module="cfpp.main"):
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, cwd=ROOT
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--config is missing; give a file such as configs/quickstart.py"),
        (["--config=configs/stage9.py"], "there is no file 'configs/stage9.py'"),
        (["--config=README.md"], "--config=README.md: SyntaxError: "),
        (["--config=configs/common.py"], "configs/common.py has no get_config that returns"),
        (["--config=configs/stage1.py:nonsense"], "config argument 'nonsense' is none of arena"),
        ([STAGE1, "--config.modle.dim=64"], "no such field; the nearest is model.dim"),
        ([STAGE1, "--config.model.dmi=64"], "no such field; the nearest is model.dim"),
        (["--config=configs/quickstart.py", "--config.stage1.step=3"], "nearest is stage1.steps"),
        ([STAGE1, "--config.steps.x=3"], "no such field; the nearest is steps"),
        ([STAGE1, "--config.steps=many"], "--config.steps=many: give a value of type int, as the"),
        ([STAGE1, "--config.steps=1.5"], "--config.steps=1.5: give a value of type int"),
        ([STAGE1, "--config.=3"], "no such field; the nearest is"),
        ([STAGE1, STAGE1], f"--config is given 2 times: {STAGE1[9:]}, {STAGE1[9:]}; give one"),
        ([STAGE1, "--workdir=x", "--join_timeout=nan"], "--join_timeout is nan; give seconds"),
        ([STAGE1, "--workdir=foo://x"], "foo://x: 'foo://' is no store that is known here"),
        ([STAGE1, "--config.model=3"], "--config.model=3: this is a group of fields; set --config"),
        ([STAGE1, "--config.ema={}"], "this is a group of fields; set --config.ema.decay"),
        ([STAGE1, "--config.resample.sigma[5]=1"], "no such field; the nearest is resample.sigma"),
        (["--config=configs/stage3.py", "--config.real_model=3"], "a group of fields; give a dict"),
        (
            ["--config=configs/stage3.py", "--config.positions=(1,'a')"],
            "give a tuple, as the default (1",
        ),
        (
            [STAGE1, "--config.pattern.first_chunk=x"],
            "=x: give a value of type int\n",
        ),
        ([STAGE1, "--workdir=x", "--num_processes=two"], "flag --num_processes=two: "),
        ([STAGE1, "--workdir=x", "--profile=maybe"], "flag --profile=maybe: "),
        ([STAGE1, "--wrkdir=x"], "Unknown command line flag 'wrkdir'. Did you mean: workdir"),
        ([STAGE1, "--workdir=x", "steps=3"], "unexpected argument 'steps=3'"),
        ([STAGE1], "--workdir is missing"),
        ([STAGE1, "--workdir=x", "--num_processes=2"], "give --coordinator_address (or JAX_COORD"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(arguments, message):
    done = command(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


@pytest.mark.parametrize("module", ["rollout", "evaluate", "export", "data.prepare"])
def test_mistakes_of_other_commands_are_one_line(module):
    done = command("--wrkdir=x", module=f"cfpp.{module}")
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: .* required.*\n", done.stderr)


@pytest.mark.parametrize("empty, other", [("--workdir", "--out"), ("--out", "--workdir")])
def test_an_empty_option_is_told(empty, other):
    with pytest.raises(UserError, match=f"^{empty} is empty; give it a value$"):
        export.main([f"{empty}=", f"{other}=x"])


def test_the_home_directory_may_be_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.absolute("~/run") == tmp_path / "run"
    assert rollout_command.parse(["--workdir=~/run"]).workdir == str(tmp_path / "run")


def test_a_cause_that_was_set_aside_is_none():
    def fail():
        try:
            os.stat("/nowhere")
        except OSError:
            raise KeyError("a fault of the program") from None

    with pytest.raises(KeyError), workdirs.disk_faults("x", "mend that"):
        fail()


def test_stages_of_a_job_share_model_and_mesh():
    config = quickstart.get_config()
    config.model.attention = "reference"
    config.stage2.mesh.fsdp = 2
    config = config.copy_and_resolve_references()
    assert {config[job].model.attention for job in config.jobs} == {"reference"}
    assert {config[job].mesh.fsdp for job in config.jobs} == {2} and config.mesh.fsdp == 2


def test_help():
    done = command("--help")
    assert "--workdir" in done.stdout and done.returncode < 2


def test_sigterm_saves_and_exits_cleanly(tmp_path):
    """A real stage, tiny."""
    smaller = {
        "data.directory": tmp_path / "data", "data.episodes": 2, "data.frames": 2,
        "data.episode_frames": 4, "model.dim": 16, "model.layers": 1, "model.frequency_dim": 8,
        "optimizer.name": "adamw", "steps": 1_000_000, "save_every": 1_000_000, "log_every": 1,
    }  # fmt: skip
    train = [sys.executable, "-m", "cfpp.main", "--config=configs/stage0.py:smoke"]
    train += [f"--config.{name}={value}" for name, value in smaller.items()]
    run = subprocess.Popen(
        [*train, f"--workdir={tmp_path / 'run'}"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    )  # fmt: skip
    for line in run.stdout:
        if "step " in line:
            run.send_signal(signal.SIGTERM)
            break
    out, err = run.communicate()
    assert run.returncode == 0 and "Traceback" not in err
    (step,) = items.steps(tmp_path / "run" / "checkpoints")
    assert f"interrupted at step {step}, saved; run the same command to continue" in out


def test_a_sigterm_where_there_is_nothing_to_save():
    """What is open is closed, and nothing else of Python's end is run: XLA may still compute."""
    program = """
import atexit, os
from cfpp import main
atexit.register(os._exit, 139)
try:
    main._leave()
finally:
    print("closed", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert done.stdout == "interrupted; run the same command to continue\nclosed\n"


def test_ctrl_c_ends_before_what_xla_computes_on():
    program = """
import atexit, os
from cfpp import errors
atexit.register(os._exit, 139)
with errors.exit_on_user_error("interrupted; run the same command to continue"):
    print("open")
    raise KeyboardInterrupt
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stdout == "open\n"
    assert done.stderr == "interrupted; run the same command to continue\n"


@pytest.fixture
def job():
    """Two stages, the second from the first, and an evaluation that only notes that it ran."""

    def report(workdir, settings):
        folder = pathlib.Path(workdir) / "report"
        folder.mkdir(exist_ok=True)
        jobs = [{"name": name} for name in config.jobs]
        results = {"settings": dataclasses.asdict(settings), "jobs": jobs}
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "index.html").write_text("")

    config = ml_collections.ConfigDict(
        {
            "jobs": ("first", "second"),
            "first": fake.config(steps=3),
            "second": fake.config(init_from={"teacher": "../first"}, steps=2),
            "evaluate": {"frames": 3},
        }
    )
    patches = [
        *fake.patches(),
        mock.patch("cfpp.data.pipeline.test_clips"),
        mock.patch("cfpp.evaluate.run", side_effect=report),
    ]
    evaluation = [patch.start() for patch in patches][-1]
    yield config, evaluation
    for patch in patches:
        patch.stop()


def test_a_job_of_several_stages(job, tmp_path, capsys):
    config, evaluation = job
    jobs.run(config, str(tmp_path / "job"))
    assert checkpoint.is_finished(tmp_path / "job/first", 3)
    assert checkpoint.is_finished(tmp_path / "job/second", 2)
    assert evaluation.call_count == 1

    (tmp_path / "job").rename(tmp_path / "moved")
    capsys.readouterr()
    with mock.patch("cfpp.data.pipeline.test_clips", side_effect=AssertionError):
        jobs.run(config, str(tmp_path / "moved"))  # finished, wherever it is: it needs no data
    told = capsys.readouterr().out.splitlines()
    assert [line.partition(",")[0] for line in told[:2]] == ["fake: finished"] * 2
    assert told[2] == f"the report is in {tmp_path / 'moved/report'}"
    assert evaluation.call_count == 1
    assert stored.find(tmp_path / "moved").config.init_from.teacher == str(tmp_path / "moved/first")


def test_a_finished_job_without_its_data_records_them_for_its_report(job, tmp_path):
    config, evaluation = job
    jobs.run(config, str(tmp_path))
    with mock.patch("cfpp.data.sources.prepare") as prepare:
        jobs.run(config, str(tmp_path))
        prepare.assert_not_called()
        (tmp_path / "report/index.html").unlink()
        jobs.run(config, str(tmp_path))
    assert prepare.call_count == 1 and evaluation.call_count == 2


def test_nothing_is_written_where_a_link_leads_nowhere(tmp_path):
    (tmp_path / "link").symlink_to("/nowhere")
    with pytest.raises(UserError, match="exists and is not overwritten"):
        paths.refuse_existing(tmp_path / "link")


def test_a_finished_job_evaluates_anew_with_other_settings(job, tmp_path):
    config, evaluation = job
    jobs.run(config, str(tmp_path))
    for frames, times in ((3, 1), (5, 2), (5, 2)):
        config.evaluate.frames = frames
        jobs.run(config, str(tmp_path))
        assert evaluation.call_count == times


@pytest.mark.parametrize(
    "group, field, value, message",
    [
        ("first", "steps", 0, r"^first: config\.steps is 0"),
        ("second", "batch_size", -1, r"^second: config\.batch_size is -1"),
        ("second", "stage", "nonsense", r"^second: config\.stage must be"),
        ("second", "mesh", {"data": 3}, r"^second: the mesh is data=3"),
        ("second", "init_from", {"teacher": "../frist"}, r"^second: config\.init_from\.teacher: "),
        ("second", "model", {"dim": 16}, r"^second: config\.init_from\.teacher=.*has model\.dim=8"),
        ("evaluate", "frames", 0, r"^evaluate\.frames is 0"),
    ],
)
def test_a_mistake_in_any_stage_leaves_no_trace(job, tmp_path, group, field, value, message):
    config, _ = job
    right = config.copy_and_resolve_references()
    config[group].update({field: value})
    with pytest.raises(UserError, match=message):
        jobs.run(config, str(tmp_path / "job"))
    assert not (tmp_path / "job").exists()
    jobs.run(right, str(tmp_path / "job"))


@pytest.mark.parametrize("names", [("stage0",), ("stage0", "stage1")])
def test_data_that_cannot_be_had_leave_no_trace(tmp_path, names):
    config = quickstart.get_config("smoke")
    config.stage0.data.directory = str(tmp_path / "nothing")
    config.stage0.data.name = "tfds:nothing"
    config.jobs = names
    config = config if len(names) > 1 else config.stage0
    with pytest.raises(UserError, match="no dataset 'nothing' prepared in"):
        jobs.run(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_parent_that_is_trained_too_late_leaves_no_trace(job, tmp_path):
    config, _ = job
    with config.unlocked():
        config.jobs = ("second", "first")
    with pytest.raises(UserError, match=r"^second: config\.init_from\.teacher: .*first "):
        jobs.run(config, str(tmp_path / "job"))
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize("names, named", [((), "''"), (("first", "secnod"), "'secnod'")])
def test_jobs_that_there_are_not(job, tmp_path, names, named):
    config, _ = job
    with config.unlocked():
        config.jobs = names
    with pytest.raises(UserError, match=rf"^config\.jobs has {named}; give some of first, second$"):
        jobs.run(config, str(tmp_path / "job"))
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ("[]", r"config\.json is damaged, no configuration but \[\]"),
        ('{"stage": "dmd"}', r"config\.json is damaged, .* it has no field data\.directory;"),
        ('{"stage": "dmd", "data": 3}', r"it has no field data\.directory;"),
        ('{"jobs": []}', r"config\.json is damaged, .* it has no field stage;"),
        ('{"jobs": 3}', r"config\.json is damaged: jobs are no list of names; restore it"),
        ('{"jobs": "stage0"}', r"config\.json is damaged: jobs are no list of names"),
    ],
)
def test_a_damaged_configuration_is_told(job, tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    rollout = rollout_command.parse([f"--workdir={tmp_path}"])
    for start in (
        lambda: export.main([f"--workdir={tmp_path}", f"--out={tmp_path / 'out'}"]),
        lambda: rollout_command.run(rollout),
        lambda: evaluation_command.main([f"--workdir={tmp_path}"]),
    ):
        with pytest.raises(UserError, match=message):
            start()
    with pytest.raises(UserError, match=r"damaged|was made with another|directory of a job of"):
        jobs.run(job[0].first, str(tmp_path))


MODEL = {"model": {name.removeprefix("model."): 1 for name in FIELDS if name != "model.layers"}}


def test_a_configuration_without_what_is_needed_is_told(tmp_path):
    fields = {"stage": "dmd", "data": {"directory": ""}, "init_from": {}}
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    for model, missing in (({}, r"model\.channels"), (MODEL, r"model\.layers")):
        (tmp_path / "config.json").write_text(json.dumps(fields | model))
        with pytest.raises(UserError, match=f"it has no field {missing}"):
            rollout_command.run(rollout_command.parse([f"--workdir={tmp_path}"]))
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match="it has no field steps"):
        evaluation_command.main([f"--workdir={tmp_path}"])
    model = MODEL["model"] | {"layers": 1}
    data = {"directory": "", "name": "arena", "channels": 3}
    fields = {"stage": "bidirectional", "data": data, "init_from": {}}
    fields |= {"steps": 1, "batch_size": 1, "pattern": {}, "shift": 1.0, "model": model}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"it has no field data\.frames"):
        evaluation_command.main([f"--workdir={tmp_path}"])


def test_a_job_of_several_stages_refuses_another_config(job, tmp_path):
    config, _ = job
    jobs.run(config, str(tmp_path))
    config.second.log_every = 1
    config.evaluate.frames = 4
    jobs.run(config, str(tmp_path))
    with pytest.raises(UserError, match="is the working directory of a job of several stages; "):
        jobs.run(config.first, str(tmp_path))
    config.first.steps = 4  # the second has started from step 3
    with pytest.raises(UserError, match=r"first\.steps was 3 and is now 4"):
        jobs.run(config, str(tmp_path))


def test_an_interrupted_stage_ends_the_job(job, tmp_path):
    config, evaluation = job
    with mock.patch.object(loop, "train", return_value=False) as train:
        jobs.run(config, str(tmp_path))
    assert train.call_count == 1 and not evaluation.called


def test_errors_name_the_job(job, tmp_path):
    config, _ = job
    config.second.init_from.teacher = "../frist"
    with pytest.raises(UserError, match=r"^second: config\.init_from\.teacher: .*frist does not"):
        jobs.run(config, str(tmp_path))


def test_paths_mean_the_same_from_everywhere(job, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    jobs.run(fake.config(), "../runs/a")
    with mock.patch.object(loop, "train") as train:
        jobs.run(fake.config(init_from={"teacher": "../runs/a"}), "runs/b")
    config, workdir, _ = train.call_args.args
    assert config.init_from.teacher == str(tmp_path / "runs/a")
    assert workdir == str(here / "runs/b")


def test_export_mistakes_are_one_line(tmp_path):
    done = command("--workdir=nowhere", f"--out={tmp_path / 'out'}", module="cfpp.export")
    assert done.returncode == 2
    assert done.stderr.startswith("error: nowhere does not exist") and done.stderr.count("\n") == 1
