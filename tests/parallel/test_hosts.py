"""Several processes: how they come together, train as one, and end together."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
from concurrent import futures

import pytest
from jax._src.clusters import cloud_tpu_cluster

from cfpp.errors import UserError
from cfpp.parallel import hosts
from tests.parallel import several

ROOT = pathlib.Path(__file__).parent.parent.parent

# Two processes sum in another order than one: an ulp more or less in each step.
ULPS = several.STEPS * 2**-23


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    command = [sys.executable, "-m", "tests.parallel.several", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text())


def assert_same_losses(found, name):
    assert len(found["one"]["losses"]) == several.STEPS
    assert found[name]["losses"] == pytest.approx(found["one"]["losses"], rel=ULPS)


def errors(told):
    return [re.findall("^error: .*", text, re.MULTILINE) for text in told]


def test_a_killed_process_stops_the_other_which_says_so(found):
    assert found["killed second"]["codes"] == [1, -9]
    ((error,), _) = errors(found["killed second"]["told"])
    assert error.startswith(
        "error: process 1 has ended, so this one stops too; start the job again"
    )


def test_the_first_process_killed_stops_the_other_too(found):
    """JAX may be faster to say so, and abort."""
    job = found["killed first"]
    assert job["codes"][0] == -9 and job["codes"][1] in (1, -6)
    assert re.search("process 0 has ended|another task died", job["told"][1])


def test_a_job_restarted_after_kills_trains_as_one_process_does(found):
    assert found["restarted"]["codes"] == [0, 0]
    assert_same_losses(found, "restarted")


def test_a_finished_job_started_again_is_finished(found):
    """And the first process reads its model without the others, as the evaluation does."""
    job = found["started once more"]
    assert job["codes"] == [0, 0], job["told"]
    assert f"finished, all {several.STEPS} steps" in job["told"][0]


def test_a_checkpoint_that_one_process_cannot_read_is_passed_over_by_all(found):
    job = found["damaged"]
    assert job["codes"] == [0, 0], job["told"]
    assert job["checkpoints"] == [4, 6]
    first, second = job["told"]
    assert first.count("damaged (another process cannot read its part)") == 2  # model and state
    assert second.count("passing over checkpoint") == 2
    assert "[0/2] renamed the damaged checkpoint" in first
    assert "[1/2] passing over checkpoint" in second  # lines of logs say whose they are


def test_sigterm_to_one_process_saves_and_ends_all(found):
    job = found["stopped"]
    assert job["codes"] == [0, 0]
    (step,) = job["checkpoints"]
    assert step < several.STEPS
    for told in job["told"]:  # by which launch/worker.sh on each host knows
        assert f"interrupted at step {step}, saved; run the same command to continue" in told


def test_sigterm_while_a_job_goes_on_stops_it_after_a_step(found):
    job = found["stopped while it started"]
    assert job["codes"] == [0, 0]
    before = found["stopped"]["checkpoints"]
    assert job["checkpoints"] == [*before, before[-1] + 1]


def test_one_process_continues_what_two_began(found):
    assert found["continued by one"]["codes"] == [0]
    assert_same_losses(found, "continued by one")


def test_four_processes_train_as_one_does_and_end_with_the_one_that_was_killed(found):
    codes = found["killed one of four"]["codes"]
    assert codes[2] == -9 and all(code in (1, -6) for code in codes[:2] + codes[3:])
    assert "error: process 2 has ended" in found["killed one of four"]["told"][0]
    assert found["four"]["codes"] == [0, 0, 0, 0]
    assert_same_losses(found, "four")


def test_processes_that_hold_parts_of_the_model_read_the_same_rows(found):
    """They are found by Slurm's environment."""
    assert found["tensor"]["codes"] == [0, 0]
    assert_same_losses(found, "tensor")


def test_only_the_first_process_talks(found):
    first, second = found["tensor"]["told"]
    assert f"finished {several.STEPS} steps" in first and "fake" not in second


@pytest.mark.parametrize("job", ["error of one", "error of all"])
def test_an_error_is_told_once_by_each_process(found, job):
    assert found[job]["codes"] == [2, 2]
    assert errors(found[job]["told"]) == [["error: the disk is full"]] * 2


def test_a_process_that_is_ending_does_not_care_how_others_do(monkeypatch):
    """It waits for their end and may take a part of their last line away from who follows them."""
    ours, theirs = socket.socketpair()
    monkeypatch.setattr(hosts, "_others", {1: ours})
    faults = []
    monkeypatch.setattr(threading, "excepthook", faults.append)
    before = threading.enumerate()
    with hosts._ending:
        hosts._watch()
        (follower,) = set(threading.enumerate()) - set(before)
        hosts._send(theirs, "cess 1 stopped at a ValueError, shown in its output")
        follower.join(10)
    assert not faults and not follower.is_alive()


# --- coming together


@pytest.fixture
def address():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return f"127.0.0.1:{port}"


def fault(*arguments, timeout=30.0):
    with pytest.raises(UserError) as caught:
        hosts.join(*arguments, timeout=timeout)
    return str(caught.value)


def faults(*processes):
    """What several processes, here threads, are told."""
    told = [None] * len(processes)

    def run(place, arguments):
        told[place] = fault(*arguments)

    threads = [threading.Thread(target=run, args=item) for item in enumerate(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


def test_no_coordinator(address):
    told = fault(address, 2, 1, timeout=0.3)
    assert f"process 0, cannot be reached at {address} within 0.3 s" in told
    assert "nowhere.invalid:1 within 0 s" in fault("nowhere.invalid:1", 2, 1, timeout=0.0)


def test_a_process_that_does_not_come(address):
    told = fault(address, 3, 0, timeout=0.3)
    assert told.startswith("of 3 processes, 1, 2 did not come within 0.3 s; start all with")


def test_a_port_in_use(address):
    with socket.create_server(("", int(address.rpartition(":")[2]))):
        assert f"cannot listen on port {address.rpartition(':')[2]}" in fault(address, 2, 0)


def test_processes_that_count_differently(address):
    first, second = faults((address, 2, 0), (address, 3, 1))
    assert first.startswith("process 1 counts 3 processes, process 0 counts 2; start all with")
    assert second == "process 1 counts 3 processes, process 0 counts 2"


@pytest.mark.parametrize("line", [b"GET / HTTP/1.1\r\n", b"\xff\xfe 2\n", b""])
def test_who_is_no_process_of_the_job_is_passed_over(address, line):
    """Ports are scanned."""
    host, _, port = address.rpartition(":")
    with futures.ThreadPoolExecutor() as pool:
        first = pool.submit(fault, address, 2, 0)
        while (stranger := socket.socket()).connect_ex((host, int(port))):
            stranger.close()  # process 0 does not listen yet
        with stranger:
            stranger.sendall(line)
            stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(1) == b""
        assert fault(address, 3, 1) == "process 1 counts 3 processes, process 0 counts 2"
        assert first.result().startswith("process 1 counts 3 processes, process 0 counts 2")


def test_two_processes_with_one_number(address):
    told = faults((address, 3, 0), (address, 3, 1), (address, 3, 1))
    assert all(message.startswith("there are two processes with the number 1") for message in told)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("a:1", 2, None), "give --process_id (or JAX_PROCESS_ID) too: all of --coordinator_addr"),
        ((None, 2, 0), "give --coordinator_address (or JAX_COORDINATOR_ADDRESS) too"),
        (("host", 2, 0), "the coordinator's address is 'host'; give HOST:PORT of process 0"),
        (("host:70000", 2, 0), "give HOST:PORT of process 0"),
        (("host:1", 2, 2), "process 2 of 2: give a number from 0 to 1"),
    ],
)
def test_what_is_given_is_checked(arguments, message):
    assert message in fault(*arguments)


def test_the_environment_tells_too(monkeypatch):
    for name, value in zip(hosts.VARIABLES, ("host:1", "two", "0"), strict=True):
        monkeypatch.setenv(name, value)
    assert fault() == "process '0' of 'two'; give numbers"
    monkeypatch.setenv(hosts.VARIABLES[1], "1")
    hosts.join()  # alone


@pytest.fixture
def surroundings(monkeypatch):
    """Sets variables of the environment, where nothing else tells of other processes."""
    for name in os.environ:
        if name.startswith(("JAX_COORDINATOR", "JAX_NUM", "JAX_PROCESS", "SLURM_", "TPU_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # as JAX itself does where there is no TPU

    def set_all(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_all


def test_alone_without_any_of_it(surroundings):
    hosts.join()
    assert not hosts.jax.distributed.is_initialized()


STEP = {"SLURM_JOB_ID": "17", "SLURM_STEP_NODELIST": "node[3-4]", "SLURM_NTASKS": "2"}


def test_a_step_of_slurm_tells(surroundings):
    surroundings(**STEP, SLURM_PROCID="1", SLURM_LOCALID="0")
    assert hosts._found(timeout=1) == ("node3:61457", 2, 1)
    surroundings(SLURM_NTASKS="1")
    assert hosts._found(timeout=1) is None


def test_a_step_of_slurm_that_does_not_tell_all_is_not_taken_for_one_process(surroundings):
    surroundings(**STEP)
    told = fault()
    assert "cannot learn from Slurm or the TPU where process 0 is" in told
    assert "(KeyError: 'SLURM_PROCID'); give --coordinator_address" in told


@pytest.fixture
def tpu(monkeypatch, surroundings):
    """A TPU's host, on Google's own machines if `metadata` is filled: what its server answers."""
    metadata = {}

    def get(key):
        if not metadata:
            raise OSError("no answer")
        return (metadata[key], 200) if key in metadata else ("", 404)

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", get)
    return metadata


@pytest.mark.parametrize("workers, count", [("a:0:127.0.0.1,b:1:10.0.0.2", 2), ("127.0.0.1", 1)])
def test_a_tpu_slice_tells(tpu, monkeypatch, workers, count):
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY")
    tpu |= {"worker-network-endpoints": workers, "agent-worker-number": str(count - 1)}
    assert hosts._found(timeout=1) == ("127.0.0.1:8482", count, count - 1)


def test_a_tpu_host_that_cannot_learn_its_place_is_not_taken_for_one_process(tpu, monkeypatch):
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY")
    assert "where process 0 is, and which one this is (OSError: no answer)" in fault()


def test_of_a_list_of_tpu_hosts_only_the_one_of_a_single_host_is_alone(tpu, surroundings):
    surroundings(TPU_WORKER_HOSTNAMES="localhost")
    hosts.join()
    assert not hosts.jax.distributed.is_initialized()
    surroundings(TPU_WORKER_HOSTNAMES="localhost,other", MEGASCALE_COORDINATOR_ADDRESS="localhost")
    surroundings(MEGASCALE_NUM_SLICES="1", MEGASCALE_SLICE_ID="0")
    assert "(ValueError: invalid literal for int()" in fault()  # without TPU_WORKER_ID
    surroundings(TPU_WORKER_ID="1")
    assert hosts._found(timeout=1) == ("localhost:8482", 2, 1)


def given(index, count):
    return dict(zip(hosts.VARIABLES, ("127.0.0.1:PORT", str(count), str(index)), strict=True))


def in_slurm(index, count):
    place = {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index), "SLURM_NTASKS": str(count)}
    return place | {"SLURM_JOB_ID": "PORT", "SLURM_STEP_NODELIST": "127.0.0.1"}


@pytest.mark.parametrize(
    "processes, timeout, messages",
    [
        ([given(1, 2)], 0.5, ["process 0, cannot be reached at 127.0.0.1:"]),
        ([given(0, 2), given(1, 3)], 60, ["process 1 counts 3 processes, process 0 counts 2"] * 2),
        ([in_slurm(1, 2)], 0.5, ["process 0, cannot be reached at 127.0.0.1:"]),
        ([in_slurm(0, 2)], 0.5, ["of 2 processes, 1 did not come within 0.5 s; start all"]),
        ([in_slurm(0, 2), in_slurm(1, 3)], 60, ["process 1 counts 3 processes"] * 2),
    ],
)
def test_who_does_not_find_the_others_ends_with_one_line(
    surroundings, address, tmp_path, processes, timeout, messages
):
    """The programs themselves; JAX would end them with its own message and code 134."""
    port = address.rpartition(":")[2]
    command = [sys.executable, "-m", "cfpp.main", "--config=configs/stage1.py:smoke"]
    started = [
        subprocess.Popen(
            [*command, f"--workdir={tmp_path / 'run'}", f"--join_timeout={timeout}"],
            env=os.environ | {name: value.replace("PORT", port) for name, value in place.items()},
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for place in processes
    ]
    for process, message in zip(started, messages, strict=True):
        _, told = process.communicate(timeout=200)
        assert process.returncode == 2, told
        assert told.startswith("error: ") and told.count("\n") == 1 and message in told
    assert not (tmp_path / "run").exists()
