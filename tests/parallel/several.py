"""Runs jobs of one, two and four processes, kills some of them, and writes down what came of it.

    python -m tests.parallel.several FOLDER

Each process is a fork of this one, which has the modules but no device yet: seconds saved each.
"""

import atexit
import json
import os
import pathlib
import signal
import socket
import sys
import time
import traceback
from unittest import mock

import jax
from absl import app
from jax.sharding import NamedSharding, PartitionSpec

from cfpp import main as main_module
from cfpp.errors import UserError, exit_on_user_error
from cfpp.parallel import hosts, mesh
from cfpp.train import items, jobs, metrics, stored
from tests.train import fake

DEVICES = 4  # of all processes together
STEPS = 60


def fork(log, index, count, devices, port, slurm, program) -> int:
    """A process of a job, which runs `program`; returns its id."""
    child = os.fork()
    if child:
        return child
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices // count)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if slurm:
        os.environ |= {
            "SLURM_JOB_ID": str(port),
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_NTASKS": str(count),
            "SLURM_PROCID": str(index),
            "SLURM_LOCALID": str(index),
        }
    else:
        values = (f"127.0.0.1:{port}", str(count), str(index))
        os.environ |= dict(zip(hosts.VARIABLES, values, strict=True))
    hosts.GRACE = 1.0
    code = 1
    try:
        with exit_on_user_error():
            program(index)
        code = 0
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()  # which `os._exit` does not
    os._exit(code)


def slow_down(pace: float) -> None:
    """Lets every step take `pace` seconds more."""
    step = metrics.Progress.step
    metrics.Progress.step = lambda *arguments: (time.sleep(pace), step(*arguments))


def fake_program(workdir, failing=(), terminated=(), pace=0.0, **changes):
    """Trains the fake stage; some processes fail, or get a SIGTERM before the first step.

    Every step takes `pace` seconds more.
    """

    def terminate(data_config):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(3)  # until JAX has told all

    def program(index):
        for patch in fake.patches():
            patch.start()
        if index in failing:
            failure = UserError("the disk is full")
            mock.patch("cfpp.data.sources.prepare", side_effect=failure).start()
        if index in terminated:
            mock.patch("cfpp.data.sources.prepare", terminate).start()
        slow_down(pace)
        hosts.join(timeout=30)
        with hosts.ending_together():
            jobs.run(fake.config(**{"batch_size": 8, "steps": STEPS} | changes), workdir)

    return program


def divided_program(workdir, **changes):
    """Trains the fake stage, where each process holds its part of the parameters.

    First they read a model that is there already, each its part.
    """

    dim = 64  # smaller parts would not be in files of their own

    def divide(boxed, device_mesh):
        """In the place of `mesh.state_shardings`: the fake parameters have no names."""
        rows = {True: PartitionSpec("fsdp"), False: PartitionSpec()}
        return jax.tree.map(lambda x: NamedSharding(device_mesh, rows[x.ndim > 0]), boxed)

    def program(index):
        for patch in (*fake.patches(dim), mock.patch("cfpp.parallel.mesh.state_shardings", divide)):
            patch.start()
        hosts.join(timeout=30)
        with hosts.ending_together():
            sizes = {"mesh": mesh.sizes("fsdp=4"), "model": {"dim": dim}}
            config = fake.config(batch_size=8, **sizes, **changes)
            if items.steps(workdir / "checkpoints"):
                rows = NamedSharding(mesh.create(config.mesh), PartitionSpec("fsdp"))
                stored.find(workdir).load(rows)
            jobs.run(config, workdir)

    return program


def finished_program(workdir):
    """Trains what is finished; then the first process alone reads the model, and tells numbers."""

    def program(index):
        hosts.join(timeout=30)
        with hosts.ending_together():
            jobs.run(fake.config(batch_size=8, steps=STEPS, log_every=1, save_every=STEPS), workdir)
            if hosts.is_first():
                stored.find(workdir).load()
            hosts.meet("read")
            for numbers in ([], [4, 8]):
                assert hosts.from_first(numbers if hosts.is_first() else [4, 8, 12]) == numbers

    return program


def command(*arguments):
    """The program `cfpp.main` with these arguments, without TensorBoard."""

    def program(index):
        sys.argv = ["cfpp.main", *map(str, arguments)]
        metrics._tensorboard = lambda folder: None  # seconds of imports
        app.run(main_module.main, flags_parser=main_module.parse)

    return program


class Job:
    """The processes of a job, and their working directory."""

    def __init__(self, workdir, program, count=2, slurm=False, devices=DEVICES):
        with socket.create_server(("", 0)) as server:
            port = server.getsockname()[1]
        self.workdir = workdir
        self.logs = [workdir.with_name(f"{workdir.name}.{index}") for index in range(count)]
        self.children = [
            fork(log, index, count, devices, port, slurm, program)
            for index, log in enumerate(self.logs)
        ]

    def at_step(self, step, then):
        """Sends signals (of each process, or None) once a step is logged."""
        path, deadline = self.workdir / "metrics.jsonl", time.monotonic() + 120
        while not (path.exists() and f'"step": {step},' in path.read_text()):
            assert time.monotonic() < deadline, self.told()
            time.sleep(0.002)
        for child, number in zip(self.children, then, strict=True):
            if number:
                os.kill(child, number)
        return self

    def send(self, index, number):
        os.kill(self.children[index], number)

    def told(self):
        return [log.read_text(errors="replace") for log in self.logs]

    def end(self):
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in self.children]
        return {
            "codes": codes,
            "told": self.told(),
            "checkpoints": items.steps(self.workdir / "checkpoints"),
        }


def fake_job(workdir, count=2, slurm=False, **options):
    return Job(workdir, fake_program(workdir, **options), count, slurm)


def losses(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}


def damaged(workdir: pathlib.Path) -> dict:
    """Restarts a job whose last checkpoint, of step 4, only the second process cannot read."""
    Job(workdir, divided_program(workdir, steps=4, save_every=2)).end()
    for item in (items.MODEL, items.STATE):
        for path in (workdir / "checkpoints/4" / item / "ocdbt.process_1/d").iterdir():
            os.truncate(path, path.stat().st_size // 2)
    return Job(workdir, divided_program(workdir, steps=6, save_every=2)).end()


def main(folder: pathlib.Path) -> None:
    found = {"damaged": damaged(folder / "damaged")}
    often, once = {"log_every": 1, "save_every": 4}, {"log_every": 1, "save_every": STEPS}

    one, killed, stopped = folder / "one", folder / "killed", folder / "stopped"
    found["one"] = fake_job(one, count=1, **once).end()
    found["one"]["losses"] = losses(one)

    # Slowed down, so that no step after these is logged before the signal comes.
    job = fake_job(killed, pace=0.05, **often).at_step(6, then=(None, signal.SIGKILL))
    found["killed second"] = job.end()
    job = fake_job(killed, pace=0.05, **often).at_step(11, then=(signal.SIGKILL, None))
    found["killed first"] = job.end()
    found["restarted"] = fake_job(killed, **once).end()
    found["restarted"]["losses"] = losses(killed)
    found["started once more"] = Job(killed, finished_program(killed)).end()

    job = fake_job(stopped, pace=0.1, **once).at_step(4, then=(None, signal.SIGTERM))
    found["stopped"] = job.end()
    job = fake_job(stopped, terminated=(1,), **once)
    found["stopped while it started"] = job.end()
    found["continued by one"] = fake_job(stopped, count=1, **once).end()
    found["continued by one"]["losses"] = losses(stopped)

    four = folder / "four"
    job = fake_job(four, count=4, **often).at_step(6, then=(None, None, signal.SIGKILL, None))
    found["killed one of four"] = job.end()
    found["four"] = fake_job(four, count=4, **once).end()
    found["four"]["losses"] = losses(four)

    tensor = {"mesh": {"data": 1, "tensor": 4}}  # every process needs every row
    found["tensor"] = fake_job(folder / "tensor", slurm=True, **once, **tensor).end()
    found["tensor"]["losses"] = losses(folder / "tensor")

    found["error of one"] = fake_job(folder / "error_of_one", failing=(1,)).end()
    found["error of all"] = fake_job(folder / "error_of_all", failing=(0, 1)).end()
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    sys.modules["tensorflow"] = None  # takes seconds to import, and has no part in this
    jax.config.update("jax_disable_most_optimizations", True)  # compiles faster
    main(pathlib.Path(sys.argv[1]))
