"""From a configuration to what it asks for: one stage, or several and their evaluation.

Everything is checked and the data are there before anything is claimed: a mistake leaves no trace.
"""

import contextlib
import os
from collections.abc import Iterator

import ml_collections

from cfpp import paths
from cfpp.data import sources
from cfpp.errors import UserError
from cfpp.parallel import hosts
from cfpp.train import checkpoint, checks, loop, samples, stored, workdirs

Config = ml_collections.ConfigDict


def run(config: Config, workdir: str, profile: bool = False) -> bool:
    """Trains the stage of a configuration, or the stages in its `jobs` and evaluates them.

    Args:
      config: of a stage, or of several by the names in its `jobs`.
      workdir: the working directory; each of several stages has one of its own in it, by its name.
      profile: see `loop.train`.

    Returns:
      True when all is done; False when SIGTERM came, after saving.

    Raises:
      UserError: whatever the user can mend.
    """
    if profile:
        loop.check_profiler()
    workdir = os.fspath(paths.absolute(workdir))
    jobs = _jobs(config)
    folders = {name: os.path.join(workdir, name) if name else workdir for name in jobs}
    resolved = {name: workdirs.resolve(job, folders[name]) for name, job in jobs.items()}
    done = {name for name in jobs if checkpoint.is_finished(folders[name], jobs[name].steps)}
    _check_jobs(resolved, folders, done)
    if "evaluate" in config:
        from cfpp import evaluate  # SciPy's statistics take a while

        data = next(iter(resolved.values())).data
        evaluate.check(config.evaluate, data)
    if "jobs" in config:
        workdirs.check(config, workdir)
    for name, job in jobs.items():
        with _naming(name):
            workdirs.check(job, folders[name])
            if name not in done:
                _prepare(resolved[name])
    if "evaluate" in config and len(done) < len(jobs):
        evaluate.check_clips(config.evaluate, data)
    with contextlib.ExitStack() as stack:
        if "jobs" in config:
            stack.enter_context(workdirs.alone(workdir))
            workdirs.claim(config, workdir)
        if not _train(jobs, folders, done, profile):
            return False
        if "evaluate" in config:
            if hosts.is_first():
                if len(done) < len(jobs) or not evaluate.is_reported(config, workdir):
                    sources.prepare(data)  # they may have gone since the stages were trained
                    evaluate.run(workdir, evaluate.Settings(**config.evaluate))
                else:
                    print(f"the report is in {os.path.join(workdir, 'report')}")
            hosts.meet("evaluated")
    return True


def _train(jobs: dict[str, Config], folders: dict[str, str], done: set[str], profile: bool) -> bool:
    """Trains the stages one after another, but for those that are done; see `run`."""
    for name, job in jobs.items():
        with _naming(name):
            if name in done:
                with workdirs.alone(folders[name]):
                    workdirs.claim(job, folders[name])
                if hosts.is_first():
                    print(f"{job.stage}: finished, all {job.steps} steps are in {folders[name]}")
            elif not loop.train(job, folders[name], profile):
                return False
    return True


def _jobs(config: Config) -> dict[str, Config]:
    """The stages of a configuration by name, with absolute paths; the name of a single one is ''.

    Raises:
      UserError: `config.jobs` names none, or one that there is not.
    """
    if "jobs" not in config:
        checks.check_fields(config)
        return {"": _absolute(config)}
    known = [name for name, job in config.items() if isinstance(job, Config) and "stage" in job]
    for name in config.jobs or [""]:
        if name not in known:
            raise UserError(f"config.jobs has {name!r}; give some of {', '.join(known)}")
        with _naming(name):
            checks.check_fields(config[name])
    return {name: _absolute(config[name], inside=True) for name in config.jobs}


def _check_jobs(jobs: dict[str, Config], folders: dict[str, str], done: set[str]) -> None:
    """Checks the stages that are still to be trained, as far as that goes without their data.

    Args:
      jobs: all of them by name, with the paths that they are trained with.
      folders: their working directories.
      done: names of those that have finished.

    Raises:
      UserError: something cannot be, a parent among the jobs included.
    """
    before = {}  # trained by the time that a job begins

    def find(path):
        if path in before:
            return before[path]
        parent = stored.find(path)
        where = parent.folder / "config.json"
        workdirs.require(parent.config, where, ("model", "pattern", "data.frames"))
        return parent.config

    for name, job in jobs.items():
        if name not in done:
            with _naming(name):
                stage = checks.check(job)
                if not checkpoint.has_begun(folders[name]):  # then it needs its parents
                    checks.check_parents(job, stage, find)
        before[folders[name]] = job


def _prepare(config: Config) -> None:
    """Records the data of a stage if they are missing, and checks them.

    Raises:
      UserError: the data cannot be had, or are not what the configuration says.
    """
    hosts.first_alone(lambda: sources.prepare(config.data))
    samples.check(config)


@contextlib.contextmanager
def _naming(job: str) -> Iterator[None]:
    """Puts the name of a job, where it has one, before the errors of its user."""
    try:
        yield
    except UserError as error:
        if not job:
            raise
        raise UserError(f"{job}: {error}") from error


def _absolute(config: Config, inside: bool = False) -> Config:
    """The configuration with absolute paths, so that it means the same wherever it is started.

    Args:
      config: of a stage.
      inside: whether the stage is one of several. Its paths that start with '..' are relative to
        its own working directory, so that the whole may be moved.
    """

    def absolute(path: str) -> str:
        if not path or (inside and path.startswith("..")):
            return path
        return os.fspath(paths.absolute(path))

    return workdirs.map_paths(absolute, config)
