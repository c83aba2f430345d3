"""Trains a stage, or runs a job of several stages and its evaluation.

python -m cfpp.main --config=configs/stage1.py --workdir=runs/stage1
python -m cfpp.main --config=configs/stage2.py:atari,chunk=3 --workdir=DIR --config.steps=500

The same command continues what was interrupted. Modules are imported late: a mistake on the command
line is told at once.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

import ml_collections
from absl import app, flags, logging

from cfpp import command_line
from cfpp.errors import UserError, exit_on_user_error

flags.DEFINE_string("workdir", None, "Working directory; made if missing.")
flags.DEFINE_bool("profile", False, "Record some steps for TensorBoard's profiler.")
flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, where there are several.")
flags.DEFINE_integer("num_processes", None, "How many processes there are.")
flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
flags.DEFINE_float("join_timeout", 300.0, "Seconds that processes may take to come together.")

Config = ml_collections.ConfigDict


def parse(argv: list[str]) -> list[str]:
    """Parses the command line, for `absl.app`.

    Returns:
      What is left over: the program.

    Raises:
      UserError: a mistake in it.
    """
    left_over = command_line.parse(argv)
    if not flags.FLAGS.workdir:
        raise UserError("--workdir is missing; give the directory for checkpoints and metrics")
    return left_over


def run(config: Config, workdir: str, profile: bool = False) -> None:
    """Trains the stage of a configuration, or the stages in its `jobs` and evaluates them.

    Raises:
      UserError: whatever the user can mend.
    """
    from cfpp import paths
    from cfpp.parallel import hosts
    from cfpp.train import checkpoint, loop
    from cfpp.train import workdir as workdirs

    workdir = os.fspath(paths.absolute(workdir))
    if "jobs" not in config:
        loop.train(_absolute(config), workdir, profile)
        return

    _check_jobs(config)
    folders = {name: os.path.join(workdir, name) for name in config.jobs}
    steps = {name: config[name].steps for name in config.jobs}
    todo = [name for name in steps if not checkpoint.is_finished(folders[name], steps[name])]
    jobs = _check(config, folders, todo)
    workdirs.check(config, workdir)
    for name in todo:
        with _naming(name):
            loop.prepare(jobs[name])
    workdirs.claim(config, workdir)  # only now: a mistake leaves no trace
    for name, folder in folders.items():
        with _naming(name):
            if not loop.train(_absolute(config[name], inside=True), folder, profile):
                return  # interrupted
    if "evaluate" in config:
        from cfpp import evaluate

        if hosts.is_first():
            if todo or not evaluate.is_reported(config, workdir):
                evaluate.run(workdir, evaluate.Settings(**config.evaluate))
            else:
                print(f"the report is in {os.path.join(workdir, 'report')}")
        hosts.meet("evaluated")


def _check_jobs(config: Config) -> None:
    """Raises UserError if `config.jobs` names none, or one that there is not."""
    known = [name for name, job in config.items() if isinstance(job, Config) and "stage" in job]
    for name in config.jobs or [""]:
        if name not in known:
            raise UserError(f"config.jobs has {name!r}; give some of {', '.join(known)}")


def _check(config: Config, folders: dict[str, str], todo: list[str]) -> dict[str, Config]:
    """Checks the jobs that are still to be done, and the evaluation, before any of them begins.

    Args:
      config: of all.
      folders: the working directories of all jobs by name.
      todo: names of those that have not finished.

    Returns:
      The configurations of all jobs, with absolute paths.

    Raises:
      UserError: something in the configuration cannot be, a parent among the jobs included.
    """
    from cfpp.train import checkpoint, loop
    from cfpp.train import workdir as workdirs

    jobs = {
        name: workdirs.resolve(_absolute(config[name], inside=True), folder)
        for name, folder in folders.items()
    }
    before = {}  # trained by the time that a job begins
    find = lambda path: before[path] if path in before else checkpoint.find_model(path)[1]
    for name, job in jobs.items():
        if name in todo:
            with _naming(name):
                loop.check(job, find)
        before[folders[name]] = job
    if "evaluate" in config:
        from cfpp import evaluate

        evaluate.check(config.evaluate, jobs[config.jobs[0]].data)
    return jobs


@contextlib.contextmanager
def _naming(job: str) -> Iterator[None]:
    """Puts the name of a job before the errors of its user."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{job}: {error}") from error


def _absolute(config: Config, inside: bool = False) -> Config:
    """The configuration with absolute paths, so that it means the same wherever it is started.

    Args:
      config: of a stage.
      inside: whether the stage is one of several. Its paths that start with '..' are relative to
        its own working directory, so that the whole may be moved.
    """
    from cfpp import paths
    from cfpp.train import workdir as workdirs

    def absolute(path: str) -> str:
        if not path or paths.is_remote(path) or (inside and path.startswith("..")):
            return path
        return os.path.abspath(os.path.expanduser(path))

    return workdirs.map_paths(absolute, config)


def _leave(*_) -> None:
    print("interrupted; run the same command to continue", flush=True)
    sys.exit()


def main(argv: list[str]) -> None:
    """Runs what the flags say."""
    del argv
    if not flags.FLAGS["verbosity"].present:  # Orbax tells much of itself
        logging.set_verbosity(logging.WARNING)
    signal.signal(signal.SIGTERM, _leave)  # while there is nothing to save
    from cfpp.parallel import hosts

    hosts.join(
        flags.FLAGS.coordinator_address,
        flags.FLAGS.num_processes,
        flags.FLAGS.process_id,
        flags.FLAGS.join_timeout,
    )
    with hosts.ending_together():
        run(flags.FLAGS.config, flags.FLAGS.workdir, flags.FLAGS.profile)


if __name__ == "__main__":
    with exit_on_user_error("interrupted; run the same command to continue"):
        app.run(main, flags_parser=parse)
