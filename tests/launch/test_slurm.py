import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
HERE = pathlib.Path(__file__).parent
SCRIPT = ROOT / "launch/slurm.sbatch"
TRAIN = ["--config=configs/stage1.py:smoke", "--workdir=/shared/stage1", "--config.steps=3"]


def start(folder, *arguments, job="0", python=sys.executable):
    (folder / "job").write_text(job)
    return subprocess.Popen(
        ["bash", SCRIPT, *arguments],
        env={
            "PATH": f"{HERE / 'bin'}:/usr/bin:/bin",
            "CLOUD": str(folder),
            "SLURM_JOB_ID": "17",
            "PYTHON": python,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        process_group=0,
    )


def test_a_dry_run_prints_the_command_and_calls_nothing(tmp_path):
    out, err = start(tmp_path, "--dry_run", *TRAIN).communicate()
    assert err == "" and not (tmp_path / "srun").exists()
    assert out.startswith("srun ") and out.endswith(f"-m cfpp.main {' '.join(TRAIN)}\n")


@pytest.mark.parametrize("code", [0, 2, 137])
def test_the_job_ends_as_its_processes_do(code, tmp_path):
    job = start(tmp_path, *TRAIN, job=str(code))
    job.communicate()
    assert job.returncode == code
    assert (tmp_path / "srun").read_text().endswith(f"-m cfpp.main {' '.join(TRAIN)}\n")
    assert not (tmp_path / "scontrol").exists()


def test_before_its_time_is_up_it_saves_and_queues_itself_again(tmp_path):
    job = start(tmp_path, *TRAIN, job="train")
    deadline = time.monotonic() + 60
    while not (tmp_path / "srun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    job.wait(timeout=60)
    assert job.returncode == 0
    assert (tmp_path / "srun").read_text().endswith("\nsaved\n")
    assert (tmp_path / "scontrol").read_text() == "requeue 17\n"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)  # the stub's sleep


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--config is missing; give a file such as configs/stage1.py"),
        (["--config=configs/stage9.py"], "there is no file 'configs/stage9.py' in "),
        (TRAIN[:1], "--workdir is missing; give a folder that all nodes share"),
        ([*TRAIN, "steps=3"], "unexpected argument 'steps=3'; options are --name=value"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path):
    job = start(tmp_path, *arguments)
    _, err = job.communicate()
    assert job.returncode == 2 and not (tmp_path / "srun").exists()
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_without_an_installation(tmp_path):
    _, err = start(tmp_path, *TRAIN, python="/nowhere/python").communicate()
    assert err == "error: there is no /nowhere/python; run make install, or set PYTHON\n"


def test_all_scripts_are_clean():
    scripts = [SCRIPT, ROOT / "launch/worker.sh", ROOT / ".ci/run", *(HERE / "host_bin").iterdir()]
    shellcheck = shutil.which("shellcheck", path=pathlib.Path(sys.executable).parent)
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
