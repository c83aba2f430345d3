import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
HERE = pathlib.Path(__file__).parent
SCRIPT, CHAIN = ROOT / "launch/slurm.sbatch", ROOT / "launch/slurm.sh"
TRAIN = ["--config=configs/stage1.py:smoke", "--workdir=/shared/stage1", "--config.steps=3"]
JOBS = [f"--job={' '.join(TRAIN)}", "--job=--config=configs/stage2.py '--workdir=/shared/stage 2'"]


def start(folder, *arguments, script=SCRIPT, job="0", python=sys.executable):
    (folder / "job").write_text(job)
    return subprocess.Popen(
        ["bash", script, *arguments],
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


def test_a_dry_run_prints_the_commands_and_calls_nothing(tmp_path):
    out, err = start(tmp_path, "--dry_run", *TRAIN, "--config.text=a b").communicate()
    assert err == "" and [path.name for path in tmp_path.iterdir()] == ["job"]
    run, requeue = out.splitlines()
    assert run.startswith("srun ")
    assert run.endswith(rf"-m cfpp.main {' '.join(TRAIN)} --config.text=a\ b")
    assert requeue == "scontrol requeue 17"


def test_a_dry_run_of_a_chain_prints_the_commands_and_calls_nothing(tmp_path):
    chain = start(tmp_path, "--nodes=4", *JOBS, "--dry_run", script=CHAIN)
    out, err = chain.communicate()
    assert err == "" and [path.name for path in tmp_path.iterdir()] == ["job"]
    first, run, requeue, second, *_ = out.splitlines()
    assert first == f"sbatch --parsable --nodes=4 launch/slurm.sbatch {' '.join(TRAIN)}"
    assert run.startswith("srun ") and requeue.startswith("scontrol requeue ")
    assert " --dependency=afterok:JOB_ID " in second and second.endswith(
        r"--workdir=/shared/stage\ 2"
    )


def test_stages_of_a_chain_wait_for_each_other(tmp_path):
    chain = start(tmp_path, "--nodes=4", *JOBS, script=CHAIN)
    out, err = chain.communicate()
    assert chain.returncode == 0 and err == "" and out.count("submitted as ") == 2
    first, second = (tmp_path / "sbatch").read_text().splitlines()
    assert first == f"--parsable --nodes=4 launch/slurm.sbatch {' '.join(TRAIN)}"
    assert second.startswith(
        "--parsable --nodes=4 --dependency=afterok:1 --kill-on-invalid-dep=yes"
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--job is missing; give the arguments of launch/slurm.sbatch in quotes"),
        (["--job='"], "--job=': the quotes do not match"),
        ([JOBS[0], "--job=--config=configs/stage9.py"], "there is no file 'configs/stage9.py' in "),
    ],
)
def test_a_chain_with_a_mistake_is_not_begun(arguments, message, tmp_path):
    chain = start(tmp_path, *arguments, script=CHAIN)
    _, err = chain.communicate()
    assert chain.returncode == 2 and not (tmp_path / "sbatch").exists()
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


@pytest.mark.parametrize("code", [0, 2, 137])
def test_the_job_ends_as_its_processes_do(code, tmp_path):
    job = start(tmp_path, *TRAIN, job=str(code))
    job.communicate()
    assert job.returncode == code
    assert (tmp_path / "srun").read_text().endswith(f"-m cfpp.main {' '.join(TRAIN)}\n")
    assert not (tmp_path / "scontrol").exists()


def test_told_to_end_it_saves_and_queues_itself_again(tmp_path):
    """Its processes are told, and not srun, which would kill them."""
    job = start(tmp_path, *TRAIN, job="train")
    deadline = time.monotonic() + 60
    while not (tmp_path / "task").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    job.wait(timeout=60)
    assert job.returncode == 143  # not through
    assert (tmp_path / "scancel").read_text() == "--signal=TERM 17\n"
    assert (tmp_path / "srun").read_text().endswith("\nsaved\n")
    assert (tmp_path / "scontrol").read_text() == "requeue 17\n"


def test_where_only_its_processes_are_told_it_queues_itself_again_too(tmp_path):
    """As before its time is up. They end with 0; what waits for this stage must not begin."""
    assert "\n#SBATCH --signal=TERM@300\n" in SCRIPT.read_text()  # with B: only the script is
    job = start(tmp_path, *TRAIN, job="preempted")
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 143 and "interrupted at step 3, saved" in out
    assert (tmp_path / "scontrol").read_text() == "requeue 17\n"


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
    scripts = [*ROOT.glob("launch/*.s*"), ROOT / ".ci/run", *(HERE / "host_bin").iterdir()]
    shellcheck = shutil.which("shellcheck", path=pathlib.Path(sys.executable).parent)
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
