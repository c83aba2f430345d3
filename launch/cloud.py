"""Trains on Google Cloud: on a TPU slice of any number of hosts, or on one GPU machine.

    python launch/cloud.py tpu run --name=cf --zone=us-east5-a --accelerator=v5p-128 --spot \
        --job="--config=configs/stage1.py --config.batch_size=64 --workdir=gs://BUCKET/stage1" \
        --job="--config=configs/stage2.py --config.batch_size=64 --workdir=gs://BUCKET/stage2 ..."
    python launch/cloud.py gpu run --name=cf --zone=us-central1-a --spot \
        --machine_type=a3-highgpu-1g ...
    python launch/cloud.py tpu fetch --name=cf --zone=us-east5-a --source=gs://BUCKET/stage1
    python launch/cloud.py tpu logs|stop|delete --name=cf --zone=us-east5-a

`run` does all there is: it creates the machine, installs cfpp on all hosts, starts the jobs and
watches them; what is preempted or lost is made again, and the jobs go on from their checkpoints.
`create` and `setup` are its first steps alone. Every command may be repeated at any time, and
--dry_run prints what it would call. Only the standard library is used; see docs/launch.md.
"""

import argparse
import contextlib
import hashlib
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import ClassVar, NoReturn

ROOT = pathlib.Path(__file__).resolve().parent.parent
SENT = ("cfpp", "configs", "launch", "setup.py", "pyproject.toml", "constraints.txt")

# A machine's states, whatever Google calls them.
ABSENT, WAITING, READY, LOST, REFUSED = "absent", "waiting", "ready", "lost", "refused"

WORKER = "cfpp/launch/worker.sh"  # on a host, in the home directory
CRASHED = r"exited (?!0$|143\b)"  # not through, nor ended by SIGTERM

PATIENCE = 5  # failures in a row of gcloud, of requests, or of reaching a host, that are borne

RUNTIMES = {  # TPU software versions
    "v2": "tpu-ubuntu2204-base",
    "v3": "tpu-ubuntu2204-base",
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}

NO_CAPACITY = re.compile(r"POOL_EXHAUSTED|enough resources|no more capacity|currently unavailable")
NOT_FOUND = re.compile(r"NOT_FOUND|was not found|not found", re.IGNORECASE)

Command = list[str]
Call = Callable[[Command], str]  # what it printed; raises `Failure`


class UserError(Exception):
    """A fault that the user can mend, told in one line."""


class Failure(Exception):
    """A command that failed, with what it said."""


class Tpu:
    """A TPU slice, asked for by a queued resource of the same name."""

    extra = "tpu"
    states: ClassVar[dict[str, str]] = {
        "ACTIVE": READY,
        "FAILED": REFUSED,  # before it was ready
        "SUSPENDED": LOST,
    }  # all others: it is coming

    def __init__(self, options: argparse.Namespace):
        self.options = options

    def describe(self) -> Command:
        """Asks for the state and, where it failed, why."""
        return self._queue("describe", "--format=value(state.state,state.failedData.error.message)")

    def create(self) -> Command:
        """Asks for the slice."""
        accelerator = self.options.accelerator
        return self._queue(
            "create",
            f"--node-id={self.options.name}",
            f"--accelerator-type={accelerator}",
            f"--runtime-version={RUNTIMES[accelerator.partition('-')[0]]}",
            *(["--spot"] if self.options.spot else []),
        )

    def restart(self) -> list[Command]:
        """Makes a lost slice again: a queued resource is used once."""
        return [self.delete(), self.create()]

    reset = restart  # of a slice with a host that does not answer

    def delete(self) -> Command:
        """Gives the slice back."""
        return self._queue("delete", "--force")

    def ssh(self, command: str, worker: str = "all") -> Command:
        """Runs a command on one host or all of them."""
        return self._vm("ssh", self.options.name, f"--worker={worker}", f"--command={command}")

    def copy(self, source: str, destination: str, worker: str = "all") -> Command:
        """Copies to or from hosts; `HOST:` before a path is this machine."""
        return self._vm("scp", "--recurse", f"--worker={worker}", source, destination)

    def _queue(self, verb: str, *flags: str) -> Command:
        group = ["gcloud", "compute", "tpus", "queued-resources", verb, self.options.name]
        return [*group, *flags, *_place(self.options)]

    def _vm(self, verb: str, *flags: str) -> Command:
        return ["gcloud", "compute", "tpus", "tpu-vm", verb, *flags, *_place(self.options)]


class Gpu:
    """One virtual machine with GPUs. Its disk outlives preemption."""

    extra = "cuda"
    states: ClassVar[dict[str, str]] = {
        "RUNNING": READY,
        "TERMINATED": LOST,
        "STOPPED": LOST,
        "SUSPENDED": LOST,
    }

    def __init__(self, options: argparse.Namespace):
        self.options = options

    def describe(self) -> Command:
        """Asks for the state."""
        return self._instance("describe", "--format=value(status)")

    def create(self) -> Command:
        """Makes the machine, from an image with NVIDIA's driver."""
        spot = ["--provisioning-model=SPOT", "--instance-termination-action=STOP"]
        return self._instance(
            "create",
            f"--machine-type={self.options.machine_type}",
            f"--image-family={self.options.image_family}",
            "--image-project=deeplearning-platform-release",
            f"--boot-disk-size={self.options.disk_gb}GB",
            "--maintenance-policy=TERMINATE",  # machines with GPUs cannot move
            "--scopes=cloud-platform",
            *(spot if self.options.spot else []),
        )

    def restart(self) -> list[Command]:
        """Starts a stopped machine."""
        return [self._instance("start")]

    def reset(self) -> list[Command]:
        """Boots a machine that does not answer."""
        return [self._instance("reset")]

    def delete(self) -> Command:
        """Deletes the machine and its disk."""
        return self._instance("delete")

    def ssh(self, command: str, worker: str = "all") -> Command:
        """Runs a command on the machine."""
        del worker  # there is only one
        place = _place(self.options)
        return ["gcloud", "compute", "ssh", self.options.name, f"--command={command}", *place]

    def copy(self, source: str, destination: str, worker: str = "all") -> Command:
        """Copies to or from the machine."""
        del worker
        place = _place(self.options)
        return ["gcloud", "compute", "scp", "--recurse", source, destination, *place]

    def _instance(self, verb: str, *flags: str) -> Command:
        group = ["gcloud", "compute", "instances", verb, self.options.name]
        return [*group, *flags, *_place(self.options)]


def _place(options: argparse.Namespace) -> list[str]:
    project = [f"--project={options.project}"] if options.project else []
    return [f"--zone={options.zone}", *project, "--quiet"]


Machine = Tpu | Gpu


def call(command: Command) -> str:
    """Runs a command and returns what it printed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise UserError(f"there is no {command[0]} on the PATH; install it") from None
    if done.returncode:
        told = done.stderr.strip() or f"exit code {done.returncode}"
        raise Failure(" ".join(told.split()))
    return done.stdout


class Rehearsal:
    """Prints commands instead of running them; answers as if all went well.

    At first there is no machine for the commands that create one, and one for the others.
    """

    def __init__(self, machine: Machine):
        self.machine, self.is_started = machine, False
        self.is_created = machine.options.command not in CREATING

    def __call__(self, command: Command) -> str:
        """Prints a command; returns what it would say."""
        print(shlex.join(command))
        self.is_created |= "create" in command
        self.is_started |= any("worker.sh start" in word for word in command)
        if "describe" in command:
            if not self.is_created:
                raise Failure("NOT_FOUND")
            return next(name for name, state in self.machine.states.items() if state == READY)
        return "cfpp: exited 0" if self.is_started else "cfpp: idle"


def say(message: str) -> None:
    """Prints a line with the time, to stderr: a rehearsal's stdout is commands alone."""
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


def state_of(machine: Machine, call: Call) -> tuple[str, str]:
    """The machine's state, and the reason for it where one is given.

    Raises:
      Failure: gcloud does not tell.
    """
    try:
        state, _, reason = call(machine.describe()).strip().partition("\t")
        return machine.states.get(state, WAITING), reason
    except Failure as error:
        if NOT_FOUND.search(str(error)):
            return ABSENT, ""
        raise


def create(machine: Machine, call: Call) -> None:
    """Waits until the machine is ready, after creating or restarting it where that is needed.

    Raises:
      Failure: gcloud refuses, for another reason than that there is none to be had just now.
    """
    name, told, failures, refusals = machine.options.name, None, 0, 0
    while True:
        try:
            state, reason = state_of(machine, call)
            failures = 0
        except Failure as error:
            failures += 1
            if failures == PATIENCE:
                raise
            say(f"{name}: gcloud failed, trying again: {error}")
            state, reason = WAITING, ""
        if state == READY:
            if told:
                say(f"{name} is ready")
            return
        if state != told:
            say(f"{name} is {state}" + (f": {reason}" if reason else ""))
            told = state
        if state == REFUSED and not NO_CAPACITY.search(reason):
            refusals += 1
            if refusals == PATIENCE:
                raise Failure(f"{name} was refused {refusals} times: {reason or 'no reason given'}")
        if state != WAITING:
            try:
                for command in [machine.create()] if state == ABSENT else machine.restart():
                    call(command)
                continue
            except Failure as error:
                if not NO_CAPACITY.search(str(error)):
                    raise
                say(f"{name}: no capacity in {machine.options.zone}, trying again")
        time.sleep(machine.options.poll)


def setup(machine: Machine, call: Call) -> None:
    """Sends the code as it is here to all hosts, and installs it."""
    with tempfile.TemporaryDirectory() as folder:
        archive = os.path.join(folder, "cfpp.tar.gz")
        call(["tar", "-czf", archive, "--exclude=__pycache__", "-C", str(ROOT), *SENT])
        call(machine.copy(archive, f"{machine.options.name}:"))
    call(
        machine.ssh(
            "rm -rf cfpp/cfpp cfpp/configs cfpp/launch && mkdir -p cfpp && "
            f"tar -xzf cfpp.tar.gz -C cfpp && bash cfpp/launch/worker.sh setup {machine.extra}"
        )
    )


def run(machine: Machine, call: Call) -> None:
    """Brings the jobs to their end, whatever happens to the machine on the way.

    Everything is decided from what is seen now, so this may itself be ended and started again.

    Raises:
      UserError: a job says that the user made a mistake, or crashes again and again.
      Failure: no host ever answers, or the code cannot be installed.
    """
    name, jobs = machine.options.name, machine.options.job
    ident = hashlib.sha256("\n".join(jobs).encode()).hexdigest()[:8]
    crashes = silences = failed_starts = 0
    is_first_look = True
    while True:
        create(machine, call)
        try:
            hosts = status(machine, call, ident)
        except Failure as error:
            silences += 1
            say(f"{name}: a host does not answer: {error}")
            if silences == PATIENCE:
                if is_first_look:
                    raise
                say(f"{name}: resetting it")
                silences = 0
                for command in machine.reset():
                    call(command)
            time.sleep(machine.options.poll)
            continue
        silences = 0
        if "busy" in hosts:
            raise UserError(f"{name} is busy with other jobs; end them with: stop --name={name}")
        if all(host == "exited 0" for host in hosts):
            say(f"{name}: all jobs are through")
            return
        if any(host not in ("running", "exited 0") for host in hosts):
            is_mistake = lambda host: host.startswith("exited 2 ")
            crashed = [host for host in hosts if re.match(CRASHED, host)]
            crash = max(crashed, key=is_mistake, default=None)  # others crash by a mistake on one
            if crash and not is_first_look:  # what was left from before may have been mended
                if is_mistake(crash):
                    raise UserError(crash.removeprefix("exited 2 error: "))
                crashes += 1
                if crashes > machine.options.crashes:
                    raise UserError(f"{name}: {crashes} crashes, the last: {crash}; see the logs")
            say(f"{name}: starting the jobs" + (f" after a crash: {crash}" if crash else ""))
            try:
                stop(machine, call)
                setup(machine, call)
                call(machine.ssh(worker("start", ident, *jobs)))
                failed_starts = 0
            except Failure as error:
                failed_starts += 1
                if failed_starts == PATIENCE:
                    raise
                say(f"{name}: that failed, trying again: {error}")
        elif is_first_look:
            say(f"{name}: the jobs are running")
        is_first_look = False
        time.sleep(machine.options.poll)


def worker(*arguments: str) -> str:
    """The command of `worker.sh` on a host."""
    return shlex.join(["bash", WORKER, *arguments])


def status(machine: Machine, call: Call, ident: str) -> list[str]:
    """What each host says of the jobs: running, idle, busy or 'exited CODE [MESSAGE]'."""
    told = call(
        machine.ssh(
            f"if test -e {WORKER}; then {worker('status', ident)}; else echo cfpp: idle; fi"
        )
    )
    hosts = [line[6:].strip() for line in told.splitlines() if line.startswith("cfpp: ")]
    if not hosts:
        raise Failure(f"no status in {told!r}")
    return hosts


def stop(machine: Machine, call: Call) -> None:
    """Ends the jobs on all hosts; they save first."""
    call(machine.ssh(f"if test -e {WORKER}; then {worker('stop')}; fi"))


def logs(machine: Machine, call: Call) -> None:
    """Follows the log of one host until Ctrl-C."""
    command = machine.ssh("tail -n 100 -F cfpp_jobs/log", machine.options.worker)
    if isinstance(call, Rehearsal):
        call(command)
    else:
        with contextlib.suppress(KeyboardInterrupt):
            sys.exit(subprocess.call(command))


def fetch(machine: Machine, call: Call) -> None:
    """Copies a folder here, from a bucket or from the first host."""
    source, to = machine.options.source, machine.options.to
    call(["mkdir", "-p", to])
    if source.startswith("gs://"):
        call(["gcloud", "storage", "rsync", "--recursive", source, to])
    else:
        call(machine.copy(f"{machine.options.name}:cfpp/{source}", to, "0"))


def delete(machine: Machine, call: Call) -> None:
    """Deletes the machine, if it is there."""
    if state_of(machine, call)[0] == ABSENT:
        say(f"{machine.options.name} is gone already")
    else:
        call(machine.delete())


COMMANDS = {f.__name__: f for f in (create, setup, run, logs, fetch, stop, delete)}
CREATING = ("create", "run")


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        """Exits with code 2."""
        raise UserError(message)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parses and checks the command line.

    Raises:
      UserError: a mistake in it.
    """
    description, _, _ = __doc__.partition("\n\n")
    parser = Parser(description=description, allow_abbrev=False)
    kinds = parser.add_subparsers(dest="kind", required=True, parser_class=Parser)
    for kind in ("tpu", "gpu"):
        commands = kinds.add_parser(kind).add_subparsers(dest="command", required=True)
        for name, function in COMMANDS.items():
            summary = function.__doc__.partition("\n")[0]
            command = commands.add_parser(
                name, description=summary, help=summary, allow_abbrev=False
            )
            add_flags(command, kind, name)
    options = parser.parse_args(arguments)
    check(options)
    return options


def add_flags(parser: argparse.ArgumentParser, kind: str, command: str) -> None:
    """Adds the flags of one command."""
    parser.add_argument("--name", required=True, help="of the machine")
    parser.add_argument("--zone", required=True, help="such as us-east5-a")
    parser.add_argument("--project", help="gcloud's own setting, by default")
    parser.add_argument("--dry_run", action="store_true", help="only print what would be called")
    if command in CREATING:
        parser.add_argument("--spot", action="store_true", help="cheap, but may be preempted")
        parser.add_argument("--poll", type=float, default=30.0, help="seconds between two looks")
        if kind == "tpu":
            parser.add_argument("--accelerator", required=True, help="such as v5p-128")
        else:
            parser.add_argument("--machine_type", required=True, help="such as a3-highgpu-1g")
            parser.add_argument("--disk_gb", type=int, default=500)
            parser.add_argument("--image_family", default="common-cu129-ubuntu-2204-nvidia-580")
    if command == "run":
        parser.add_argument(
            "--job",
            action="append",
            required=True,
            help="arguments of cfpp.main, in quotes; give several to run one after another",
        )
        parser.add_argument("--crashes", type=int, default=10, help="borne, preemptions apart")
    if command == "logs":
        parser.add_argument("--worker", default="0", help="the host's number")
    if command == "fetch":
        parser.add_argument("--source", required=True, help="gs://... or a folder in ~/cfpp")
        parser.add_argument("--to", default="fetched", help="folder on this machine")


def check(options: argparse.Namespace) -> None:
    """Checks the values of flags.

    Raises:
      UserError: the first that cannot be right.
    """
    patterns = {
        "name": (r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", "lower-case letters, digits and hyphens"),
        "zone": (r"[a-z]+-[a-z]+[0-9]+-[a-z]", "a zone such as us-east5-a"),
        "accelerator": (
            rf"({'|'.join(RUNTIMES)})-[1-9][0-9]*",
            f"one of {', '.join(RUNTIMES)}, a hyphen and the size, such as v5p-128",
        ),
        "machine_type": (r"(a2|a3|a4|g2)-[-a-z0-9]+", "one of the families a2, a3, a4 or g2"),
        "worker": (r"[0-9]+", "the number of a host"),
    }
    for flag, (pattern, wanted) in patterns.items():
        value = getattr(options, flag, None)
        if value is not None and not re.fullmatch(pattern, value):
            raise UserError(f"--{flag}={value}: give {wanted}")
    for flag, least in {"poll": 0, "crashes": 0, "disk_gb": 50}.items():
        value = getattr(options, flag, least)
        if not value >= least:
            raise UserError(f"--{flag}={value}: give at least {least}")
    for job in getattr(options, "job", ()):
        check_job(job, options.kind)


def check_job(job: str, kind: str) -> None:
    """Checks what would otherwise be known only when the machine has been paid for."""
    try:
        words = shlex.split(job)
    except ValueError as error:
        raise UserError(f"--job={job}: {error}") from None
    flags = dict(word.split("=", 1) for word in words if "=" in word)
    for flag in ("--config", "--workdir"):
        if flag not in flags:
            raise UserError(f"--job={job}: {flag}=... is missing")
    config = flags["--config"].partition(":")[0]
    if not (config.startswith("configs/") and (ROOT / config).is_file()):
        raise UserError(f"--job={job}: there is no file {config!r}; give one in configs/")
    if kind == "tpu" and not flags["--workdir"].startswith("gs://"):
        raise UserError(
            f"--job={job}: give --workdir=gs://BUCKET/...; the disk of a TPU VM is lost with it"
        )


def main(arguments: list[str]) -> None:
    """Runs what the command line says."""
    try:
        options = parse(arguments)
        if options.dry_run:
            options.poll = 0.0
        machine = Tpu(options) if options.kind == "tpu" else Gpu(options)
        COMMANDS[options.command](machine, Rehearsal(machine) if options.dry_run else call)
    except UserError as error:
        sys.exit(report(error, 2))
    except Failure as error:
        sys.exit(report(error, 1))
    except KeyboardInterrupt:
        sys.exit("no longer watched; the machine and its jobs go on, and cost until `delete`")


def report(error: Exception, code: int) -> int:
    """Prints an error in one line; returns the exit code."""
    print(f"error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main(sys.argv[1:])
