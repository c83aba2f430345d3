import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
BIN = pathlib.Path(__file__).parent / "bin"
TPU = ["tpu", "--name=cf", "--zone=us-east5-a"]
JOB = "--job=--config=configs/stage1.py --workdir=gs://bucket/stage1"
NEXT_JOB = "--job=--config=configs/stage2.py --workdir=gs://bucket/stage2"
FLAGS = {
    "tpu": ["--name=cf", "--zone=us-east5-a", "--accelerator=v5p-16", "--spot", "--poll=0"],
    "gpu": ["--name=cf", "--zone=us-east5-a", "--machine_type=g2-standard-8", "--spot", "--poll=0"],
}


class Cloud:
    """Google's, as `bin/gcloud` plays it."""

    def __init__(self, folder):
        self.folder = folder
        self.plan(hosts=1)
        self.job("done")

    def plan(self, **plan):
        (self.folder / "plan.json").write_text(json.dumps(plan))

    def job(self, *starts):
        (self.folder / "job").write_text("".join(line + "\n" for line in starts))

    def start(self, *arguments):
        return subprocess.Popen(
            [sys.executable, ROOT / "launch/cloud.py", *arguments],
            env={"PATH": f"{BIN}:/usr/bin:/bin", "CLOUD": str(self.folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            process_group=0,
        )

    def __call__(self, *arguments):
        process = self.start(*arguments)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def calls(self, *verbs):
        """The verbs of gcloud's calls so far, those of `worker.sh` in place of ssh."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        names = "describe create start reset delete scp rsync status stop setup tail".split()
        found = []
        for line in lines:
            words = line.replace(";", " ").split()
            if "worker.sh" in line:
                words = words[max(i for i, word in enumerate(words) if "worker.sh" in word) :]
            found.append(next(word for word in words if word in names))
        return [verb for verb in found if not verbs or verb in verbs]

    def started(self, host=0):
        path = self.folder / f"started.{host}"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def cloud(tmp_path):
    yield Cloud(tmp_path)
    for path in tmp_path.glob("hosts/*/cfpp_jobs/pid"):
        try:
            os.killpg(int(path.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            pass


SETUP = ["tar -czf", " scp ", "worker.sh setup"]
LOOK, START = [" describe "], ["worker.sh status", "worker.sh stop", *SETUP, "worker.sh start"]


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
@pytest.mark.parametrize(
    "command, flags, printed",
    [
        ("create", [], [*LOOK, " create ", *LOOK]),
        ("setup", [], SETUP),
        ("run", [JOB, NEXT_JOB], [*LOOK, " create ", *LOOK, *START, *LOOK, "worker.sh status"]),
        ("logs", ["--worker=3"], ["tail -n 100 -F"]),
        ("fetch", ["--source=gs://bucket/a"], ["mkdir -p fetched", " rsync "]),
        ("fetch", ["--source=runs", "--to=here"], ["mkdir -p here", " scp "]),
        ("stop", [], ["worker.sh stop"]),
        ("delete", [], [*LOOK, " delete "]),
    ],
)
def test_a_dry_run_prints_every_command_and_calls_none(command, kind, flags, printed, tmp_path):
    all_flags = FLAGS[kind] if command in ("create", "run") else FLAGS[kind][:2]
    done = subprocess.run(
        [sys.executable, ROOT / "launch/cloud.py", kind, command, *all_flags, *flags, "--dry_run"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(printed), lines
    for line, part in zip(lines, printed, strict=True):
        assert part in line and line.startswith(("gcloud ", "tar ", "mkdir "))
    if " create " in printed:
        flag = {"tpu": "--spot", "gpu": "--provisioning-model=SPOT"}[kind]
        assert flag in lines[1]
    if command == "run":
        assert all(job in done.stdout for job in ("gs://bucket/stage1", "gs://bucket/stage2"))
    assert list(tmp_path.iterdir()) == []


def test_run_does_all_there_is_on_all_hosts(cloud):
    cloud.plan(hosts=2, create=["queued"])
    done = cloud("tpu", "run", *FLAGS["tpu"], JOB)
    assert done.returncode == 0, done.stderr
    assert "all jobs are through" in done.stderr
    once = [verb for verb in cloud.calls() if verb not in ("describe", "status")]
    assert once == ["create", "stop", "scp", "setup", "start"]
    for host in (0, 1):
        assert cloud.started(host) == [
            "-m cfpp.main --config=configs/stage1.py --workdir=gs://bucket/stage1"
        ]
        home = cloud.folder / f"hosts/{host}"
        assert (home / "cfpp/cfpp/main.py").read_text() == (ROOT / "cfpp/main.py").read_text()
        assert "--editable .[tpu,atari,gcs,tensorboard]" in (home / "installed").read_text()


def test_repeating_run_when_all_is_done_does_nothing(cloud):
    assert cloud("tpu", "run", *FLAGS["tpu"], JOB).returncode == 0
    before = len(cloud.calls())
    done = cloud("tpu", "run", *FLAGS["tpu"], JOB)
    assert done.returncode == 0 and "all jobs are through" in done.stderr
    assert cloud.calls()[before:] == ["describe", "status"]


def test_jobs_run_one_after_another_and_a_failure_ends_the_chain(cloud):
    cloud.job("done", "mistake")
    done = cloud("gpu", "run", *FLAGS["gpu"], JOB, NEXT_JOB, JOB.replace("stage1", "stage3"))
    assert done.returncode == 2
    assert [line.partition("configs/")[2][:6] for line in cloud.started()] == ["stage1", "stage2"]
    assert done.stderr.splitlines()[-1] == "error: config.steps is 0"


def test_setup_is_quick_when_nothing_has_changed(cloud):
    assert cloud("gpu", "run", *FLAGS["gpu"], JOB).returncode == 0
    installed = cloud.folder / "hosts/0/installed"
    before = installed.read_text()
    assert cloud("gpu", "setup", *FLAGS["gpu"][:2]).returncode == 0
    assert installed.read_text() == before


def test_a_tpu_without_capacity_is_asked_for_again(cloud):
    cloud.plan(create=["failed", "failed", "queued"])
    done = cloud("tpu", "create", *FLAGS["tpu"])
    assert done.returncode == 0, done.stderr
    changes = cloud.calls("create", "delete")
    assert changes == ["create", "delete", "create", "delete", "create"]
    assert "cf is refused: There is no more capacity in the zone" in done.stderr
    assert done.stderr.endswith("cf is ready\n")


def test_a_tpu_without_capacity_is_asked_for_without_end(cloud):
    cloud.plan(create=["failed"] * 7 + ["queued"])
    assert cloud("tpu", "create", *FLAGS["tpu"]).returncode == 0


def test_a_tpu_that_is_refused_for_another_reason_is_not_asked_for_without_end(cloud):
    cloud.plan(create=["refused"])
    done = cloud("tpu", "run", *FLAGS["tpu"], JOB)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: cf was refused 5 times: quota exceeded"
    assert cloud.calls("create") == ["create"] * 5


def test_a_gpu_without_capacity_is_asked_for_again(cloud):
    cloud.plan(create=["no capacity", "no capacity", "ready"])
    done = cloud("gpu", "create", *FLAGS["gpu"])
    assert done.returncode == 0, done.stderr
    assert cloud.calls("create") == ["create"] * 3
    assert done.stderr.count("no capacity in us-east5-a, trying again") == 2


def test_what_gcloud_refuses_is_told_in_one_line(cloud):
    cloud.plan(create=["quota"])
    done = cloud("tpu", "create", *FLAGS["tpu"])
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: ERROR: quota exceeded"


def test_create_leaves_what_is_there(cloud):
    for _ in range(2):
        assert cloud("tpu", "create", *FLAGS["tpu"]).returncode == 0
    assert cloud.calls("create") == ["create"]


def test_a_preempted_tpu_is_made_again_and_the_job_goes_on(cloud):
    cloud.plan(hosts=2, events={"5": "preempt"})
    cloud.job("train", "done")
    done = cloud("tpu", "run", *FLAGS["tpu"], JOB)
    assert done.returncode == 0, done.stderr
    once = [verb for verb in cloud.calls() if verb not in ("describe", "status")]
    first, again = ["create", "stop", "scp", "setup", "start"], ["delete", "create", "stop"]
    assert once == [*first, *again, "scp", "setup", "start"]
    assert len(cloud.started(0)) == len(cloud.started(1)) == 2
    assert "crash" not in done.stderr


def test_a_preempted_gpu_machine_is_started_again_and_the_job_goes_on(cloud):
    """The job saved at SIGTERM and ended with 0: it is not through."""
    cloud.plan(events={"5": "preempt"})
    cloud.job("train", "recovered")
    done = cloud("gpu", "run", *FLAGS["gpu"], "--crashes=0", JOB)
    assert done.returncode == 0, done.stderr
    assert cloud.calls("create", "delete") == ["create"]
    assert len(cloud.started()) == 2


def test_a_slice_with_a_lost_host_is_made_again(cloud):
    """The other host answers that its job is running."""
    cloud.plan(hosts=2, events={"5": "lose 1"})
    cloud.job("train", "done")
    done = cloud("tpu", "run", *FLAGS["tpu"], JOB)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("a host does not answer: ssh: connect to host") == 5
    assert cloud.calls("create", "delete") == ["create", "delete", "create"]
    assert len(cloud.started(0)) == len(cloud.started(1)) == 2


def test_short_troubles_of_the_network_change_nothing(cloud):
    cloud.plan(events={"5": "lose 0", "7": "found again", "9": "offline", "11": "preempt"})
    cloud.job("train", "done")
    done = cloud("gpu", "run", *FLAGS["gpu"], JOB)
    assert done.returncode == 0, done.stderr
    assert "gcloud failed, trying again: ERROR: connection refused" in done.stderr
    assert cloud.calls("reset") == []
    assert len(cloud.started()) == 2  # once after the preemption


def test_after_a_crash_on_one_host_all_start_again(cloud):
    cloud.plan(hosts=2)
    cloud.job("crash", "done")
    done = cloud("tpu", "run", *FLAGS["tpu"], JOB)
    assert done.returncode == 0, done.stderr
    assert "starting the jobs after a crash: exited 1" in done.stderr
    assert len(cloud.started(0)) == len(cloud.started(1)) == 2


def test_crashes_without_end_are_not_borne(cloud):
    cloud.job("crash")
    done = cloud("gpu", "run", *FLAGS["gpu"], "--crashes=1", JOB)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: cf: 2 crashes, the last: exited 1; see the logs"
    assert len(cloud.started()) == 2


def test_a_mended_mistake_may_be_tried_again(cloud):
    cloud.job("mistake", "done")
    assert cloud("gpu", "run", *FLAGS["gpu"], JOB).returncode == 2
    assert cloud("gpu", "run", *FLAGS["gpu"], JOB).returncode == 0


def test_watching_may_end_and_go_on(cloud):
    cloud.job("train")
    watch = cloud.start("gpu", "run", *FLAGS["gpu"], JOB)
    wait_until(lambda: cloud.started())
    os.killpg(watch.pid, signal.SIGINT)  # as Ctrl-C does
    _, err = watch.communicate(timeout=300)
    assert watch.returncode == 1 and "no longer watched" in err and "Traceback" not in err

    other = cloud("gpu", "run", *FLAGS["gpu"], NEXT_JOB)
    assert other.returncode == 2 and "cf is busy with other jobs" in other.stderr

    watch = cloud.start("gpu", "run", *FLAGS["gpu"], JOB)
    assert "the jobs are running" in watch.stderr.readline()
    assert len(cloud.started()) == 1
    cloud.job("done")
    assert cloud("gpu", "stop", *FLAGS["gpu"][:2]).returncode == 0  # and the watch starts it again
    _, err = watch.communicate(timeout=300)
    assert watch.returncode == 0, err


def wait_until(condition):
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_logs_and_results_come_here(cloud):
    assert cloud("gpu", "run", *FLAGS["gpu"], JOB).returncode == 0
    results = cloud.folder / "hosts/0/cfpp/runs"
    results.mkdir()
    (results / "metrics.jsonl").write_text("{}")
    assert cloud("gpu", "fetch", *FLAGS["gpu"][:2], "--source=runs", "--to=here").returncode == 0
    assert (cloud.folder / "here/runs/metrics.jsonl").read_text() == "{}"
    assert cloud("tpu", "fetch", *FLAGS["tpu"][:2], "--source=gs://bucket/a").returncode == 0
    assert "storage rsync --recursive gs://bucket/a fetched" in (cloud.folder / "calls").read_text()

    follow = cloud.start("gpu", "logs", *FLAGS["gpu"][:2])
    assert follow.stdout.readline() == "stage1: finished\n"
    os.killpg(follow.pid, signal.SIGINT)  # as Ctrl-C does
    assert follow.communicate(timeout=300)[1] == ""


def test_delete_twice(cloud):
    assert cloud("tpu", "create", *FLAGS["tpu"]).returncode == 0
    for _ in range(2):
        done = cloud("tpu", "delete", *FLAGS["tpu"][:2])
        assert done.returncode == 0, done.stderr
    assert cloud.calls("delete") == ["delete"] and "gone already" in done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["tpu"], "the following arguments are required: command"),
        (["tpu", "crate"], "invalid choice: 'crate'"),
        (["tpu", "logs", "--name=cf"], "required: --zone"),
        (["tpu", "logs", "--name=CF", "--zone=us-east5-a"], "--name=CF: give lower-case letters"),
        (["tpu", "logs", "--name=cf", "--zone=us"], "--zone=us: give a zone such as us-east5-a"),
        (["tpu", "create", *FLAGS["tpu"], "--accelerator=h100"], "--accelerator=h100: give one of"),
        (["tpu", "create", *FLAGS["tpu"], "--poll=-1"], "--poll=-1.0: give at least 0"),
        (["gpu", "create", *FLAGS["gpu"], "--machine_type=n1-x"], "families a2, a3, a4 or g2"),
        (["tpu", "run", *FLAGS["tpu"]], "required: --job"),
        (["tpu", "run", *FLAGS["tpu"], "--job=--workdir=gs://a"], "--config=... is missing"),
        (["tpu", "run", *FLAGS["tpu"], "--job='"], "No closing quotation"),
        (
            ["tpu", "run", *FLAGS["tpu"], JOB.replace("gs://bucket", "runs")],
            "give --workdir=gs://BUCKET/...; the disk of a TPU VM is lost with it",
        ),
        (
            ["gpu", "run", *FLAGS["gpu"], JOB.replace("configs/stage1", "configs/stage9")],
            "there is no file 'configs/stage9.py'; give one in configs/",
        ),
    ],
)
def test_mistakes_are_one_line(arguments, message, cloud):
    done = cloud(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr
    assert cloud.calls() == []


def test_without_gcloud(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "launch/cloud.py", "tpu", "create", *FLAGS["tpu"]],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == "error: there is no gcloud on the PATH; install it\n"
