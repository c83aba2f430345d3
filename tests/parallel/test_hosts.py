"""Several processes: how they come together, train as one, and end together."""

import json
import pathlib
import re
import socket
import subprocess
import sys
import threading

import pytest

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


def test_sigterm_to_one_process_saves_and_ends_all(found):
    job = found["stopped"]
    assert job["codes"] == [0, 0]
    (step,) = job["checkpoints"]
    assert step < several.STEPS
    assert f"interrupted at step {step}, saved; run the same command to continue" in job["told"][0]


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


def test_alone_without_any_of_it(monkeypatch):
    for name in hosts.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    hosts.join()
    assert not hosts.jax.distributed.is_initialized()
