"""Several processes, one job: how they find each other, and how they end together.

Every process learns where process 0 is, how many there are and which one it is: from TPU pods and
Slurm as JAX does, elsewhere it is told. They call the roll before JAX starts, since what is wrong
then JAX tells by an abort. The connections stay open: whoever dies is missed at once, where JAX's
own heartbeat lets the others wait in a collective for 100 s.
"""

import atexit
import contextlib
import itertools
import math
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from logging import LogRecord
from typing import NoReturn

import jax
import numpy as np
from absl import logging
from jax._src import clusters  # nothing public tells what JAX finds, without starting it
from jax.experimental import multihost_utils

from cfpp.errors import UserError, one_line

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

# Seconds for which a process that hears of another's error waits for its own: most errors are made
# by all, and each should tell its own.
GRACE = 5.0

LONGEST_WAIT = 7 * 24 * 3600  # seconds, of processes for each other; the dead are missed before

# Lines between processes: these, or an exit code and the error for which the sender ends.
PRESENT, FAREWELL = "present", "farewell"

_others: dict[int, socket.socket] = {}  # of process 0: all; of the rest: process 0
_meetings = itertools.count()
_questions = itertools.count(1)
_ending = threading.Lock()  # taken once, by the thread that ends this process


def join(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: float = 300.0,
) -> None:
    """Joins the other processes of the job, if there are any; JAX must not have been used yet.

    Without arguments they are those of the environment (`VARIABLES`), of Slurm or of a TPU pod;
    without those, this process is alone.

    Args:
      coordinator_address: HOST:PORT of process 0; the port must be free there.
      num_processes: how many there are.
      process_id: which of them this is, from 0.
      timeout: seconds that they may take to come.

    Raises:
      UserError: what was given or found is incomplete or out of range, or some process does not
        come.
    """
    given = (coordinator_address, num_processes, process_id)
    if all(value is None for value in given):
        given = tuple(os.environ.get(name) for name in VARIABLES)
    if all(value is None for value in given):
        given = _found(timeout)
    if given is None:
        return
    address, count, index = _check(*given)
    if count == 1:
        return
    if index == 0:
        _others.update(_call_roll(address, count, timeout))
    else:
        _others[0] = _answer_roll(address, count, index, timeout)
    jax.distributed.initialize(
        "{}:{}".format(*address), count, index, initialization_timeout=math.ceil(timeout)
    )
    logging.get_absl_logger().addFilter(_label(index, count))
    _watch()
    atexit.register(_tell, FAREWELL)


def _found(timeout: float) -> tuple[str, int, int] | None:
    """What a step of Slurm or a TPU slice says, as `_check` takes it; None outside of both.

    Raises:
      UserError: this process is in one, but cannot learn its place. Going on as if it were alone,
        it would train where the others do.
    """
    try:
        cluster = _cluster()
        if cluster is None:
            return None
        return (
            cluster.get_coordinator_address(timeout, os.environ.get("JAX_COORDINATOR_PORT")),
            cluster.get_process_count(),
            cluster.get_process_id(),
        )
    except Exception as error:  # of all kinds: variables that are not there, no answer to requests
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(
            "cannot learn from Slurm or the TPU where process 0 is, and which one this is "
            f"({reason}); give --coordinator_address, --num_processes and --process_id"
        ) from error


def _cluster() -> type[clusters.ClusterEnv] | None:
    """What JAX knows of the place where this process runs; None where nothing tells of others."""
    if "SLURM_STEP_NODELIST" in os.environ and os.environ.get("SLURM_NTASKS", "1") != "1":
        return clusters.SlurmCluster
    if clusters.GkeTpuCluster.is_env_present():
        # Notebooks in a cloud have a list of one host, and nobody to ask about slices.
        hosts = clusters.GkeTpuCluster._get_worker_list_in_slice()
        slices = os.environ.get("MEGASCALE_NUM_SLICES") or "1"
        return clusters.GkeTpuCluster if len(hosts) > 1 or slices != "1" else None
    return clusters.GceTpuCluster if clusters.GceTpuCluster.is_env_present() else None


def _check(address, count, index) -> tuple[tuple[str, int], int, int]:
    names = ("coordinator_address", "num_processes", "process_id")
    for name, variable, value in zip(names, VARIABLES, (address, count, index), strict=True):
        if value is None:
            raise UserError(f"give --{name} (or {variable}) too: all of --{', --'.join(names)}")
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"the coordinator's address is {address!r}; give HOST:PORT of process 0")
    try:
        count, index = int(count), int(index)
    except ValueError:
        raise UserError(f"process {index!r} of {count!r}; give numbers") from None
    if not 0 <= index < count:
        raise UserError(f"process {index} of {count}: give a number from 0 to {count - 1}")
    return (host, int(port)), count, index


def _call_roll(address: tuple[str, int], count: int, timeout: float) -> dict[int, socket.socket]:
    """Waits, in process 0, for all the others; returns their connections."""
    deadline = time.monotonic() + timeout
    present, arrived, fault = {}, [], None
    try:
        server = socket.create_server(("", address[1]), backlog=count)
    except OSError as error:
        raise UserError(f"cannot listen on port {address[1]}: {error.strerror}") from error
    with server:
        while len(present) < count - 1 and not fault:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = ", ".join(str(i) for i in range(1, count) if i not in present)
                fault = f"of {count} processes, {missing} did not come within {timeout:g} s"
                break
            _keep_alive(connection)
            words = _receive(connection, 10.0).split()  # a process of the job speaks at once
            if len(words) != 2 or not all(word.isdecimal() for word in words):
                connection.close()  # gone again, or no process of a job
                continue
            arrived.append(connection)
            index, theirs = map(int, words)
            if theirs != count:
                fault = f"process {index} counts {theirs} processes, process 0 counts {count}"
            elif index in present or index == 0:
                fault = f"there are two processes with the number {index}"
            present[index] = connection
    for connection in arrived:
        _send(connection, fault or PRESENT)
    if fault:
        raise UserError(f"{fault}; start all with the same number of processes, numbered from 0")
    return present


def _answer_roll(address: tuple[str, int], count: int, index: int, timeout: float) -> socket.socket:
    """Reports to process 0 and waits until all have; returns the connection."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            connection = socket.create_connection(address, max(deadline - time.monotonic(), 1))
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    "the coordinator, process 0, cannot be reached at {}:{} within {:g} s: {}; "
                    "is it running there?".format(*address, timeout, error.strerror or error)
                ) from error
            time.sleep(0.1)
    _keep_alive(connection)
    _send(connection, f"{index} {count}")
    reply = _receive(connection, timeout)
    if reply != PRESENT:
        raise UserError(reply or "process 0 ended while the processes were coming together")
    connection.settimeout(None)
    return connection


def _keep_alive(connection: socket.socket) -> None:
    """Lets the kernel ask now and then whether the other end is there.

    A machine that lost its power says no farewell, and firewalls forget a connection that is silent
    for ten minutes.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):  # seconds until then; macOS has two hours and another name
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)


def _send(connection: socket.socket, line: str) -> None:
    with contextlib.suppress(OSError):  # its end is told where it is read from
        connection.sendall(f"{line}\n".encode())


def _receive(connection: socket.socket, timeout: float | None) -> str:
    """The next line; '' once the other end is closed."""
    connection.settimeout(timeout)
    line = b""
    try:
        while not line.endswith(b"\n"):
            part = connection.recv(1)
            if not part:
                return ""
            line += part
    except OSError:
        return ""
    return line.decode(errors="replace").strip()


def _tell(line: str) -> None:
    for connection in _others.values():
        _send(connection, line)


def _watch() -> None:
    """Ends this process when another one ends otherwise than by coming to its end."""

    def follow(index, connection):
        line = _receive(connection, None)
        if line == FAREWELL or _ending.locked():  # then `_wait_for_end` may have read a part of it
            return
        code, _, error = line.partition(" ")
        if code == "2":
            time.sleep(GRACE)
        if not line:
            error = (
                f"process {index} has ended, so this one stops too; start the job again, and it "
                "goes on from its last checkpoint"
            )
        _end(error, int(code or 1))

    for index, connection in _others.items():
        threading.Thread(target=follow, args=(index, connection), daemon=True).start()


def _label(index: int, count: int) -> Callable[[LogRecord], bool]:
    """Lets every line of a log say which process it comes from; for `Logger.addFilter`."""

    def add(record):
        record.msg = f"[{index}/{count}] {record.msg}"
        return True

    return add


def _end(error: str, code: int) -> NoReturn:
    """Tells why, and ends the process without JAX's farewell, which would wait for the others."""
    with _ending:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        _tell(f"{code} {error}")
        if jax.process_index() == 0:  # once it is gone, JAX aborts the others
            deadline = time.monotonic() + 2 * GRACE
            for connection in _others.values():
                _wait_for_end(connection, deadline)
            if not _others:
                time.sleep(GRACE)
        os._exit(code)


def _wait_for_end(connection: socket.socket, deadline: float) -> None:
    """Returns once the other end is closed."""
    connection.settimeout(max(deadline - time.monotonic(), 0.001))
    with contextlib.suppress(OSError):
        while connection.recv(1024):
            pass


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Where there are other processes, an error ends this one at once, and them.

    Left to itself, Python would wait at the end for all processes to come there.
    """
    try:
        yield
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        if isinstance(error, UserError):
            _end(str(error), 2)
        if isinstance(error, jax.errors.JaxRuntimeError):
            time.sleep(1)  # the end of another process may be the cause, and is told meanwhile
        traceback.print_exc()
        name = type(error).__name__
        _end(f"process {jax.process_index()} stopped at a {name}, shown in its output", 1)


def is_first() -> bool:
    """Whether this process is the one that writes and talks for all."""
    return jax.process_index() == 0


def meet(where: str) -> None:
    """Returns once all processes are here; `where` is the same in all of them.

    It may take long: no device waits, whose collectives would give up.
    """
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost  # seconds

        barrier = multihost.get_barrier_sync_fn()
        barrier(key=f"{where} {next(_meetings)}", timeout_ms=LONGEST_WAIT * 1000)


def terminated() -> bool:
    """Whether SIGTERM came to any process; the same in all, which ask after every step.

    JAX answers at a number that every process is certain to reach. So they are asked one after
    another without gaps, where a run goes on or another stage begins too.
    """
    return multihost_utils.reached_preemption_sync_point(next(_questions))


def from_first(numbers: Sequence[int]) -> list[int]:
    """The first process's numbers, whatever the others give: one list to go by in all."""
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(numbers))))
    return multihost_utils.broadcast_one_to_all(np.resize(np.int32(numbers), count)).tolist()


def first_alone(action: Callable[[], object]) -> None:
    """Lets the first process act, then all others: what it leaves on a disk of all they find."""
    if is_first():
        action()
    meet("the first has acted")
    if not is_first():
        action()
    meet("all have acted")
