"""The configuration that a working directory belongs to, kept in its `config.json`."""

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_collections
from absl import logging
from etils import epath
from flax import traverse_util

from cfpp import paths
from cfpp.errors import UserError, causes
from cfpp.parallel import hosts

# Fields of a stage that may change between the starts of a run, since no step depends on them, or
# by the order of sums alone: a run may go on with fewer devices, less memory, or data that moved.
# `steps` may grow, but not in a job of several stages: others have started from this one.
OPERATIONAL = (
    "log_every", "save_every", "sample_every", "keep", "accumulate",
    "data.directory", "data.workers",
    "mesh.data", "mesh.fsdp", "mesh.context", "mesh.tensor",
    "model.attention", "model.remat", "model.unroll",
)  # fmt: skip

FAULTS_OF_THE_DISK = {
    errno.EACCES: "permission denied",
    errno.EDQUOT: "the disk quota is used up",
    errno.EEXIST: "a file is in the way",
    errno.EIO: "the disk fails",
    errno.EISDIR: "a folder is in the way",
    errno.ELOOP: "links that lead in a circle",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ENOENT: "no such folder, and it cannot be made",
    errno.ENOSPC: "the disk is full",
    errno.ENOTDIR: "not a folder",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
}

# TensorFlow, which reads and writes buckets where it is installed, has numbers of its own.
FAULTS_OF_TENSORFLOW = {5: errno.ENOENT, 7: errno.EACCES, 16: errno.EACCES}


@contextlib.contextmanager
def disk_faults(where: epath.PathLike, hint: str) -> Iterator[None]:
    """Turns what a disk refuses (no space, no permission) into a `UserError`.

    Args:
      where: what was being written, unless the exception knows better.
      hint: what the user may do.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = refusal(error)
        if reason is None:
            raise
        where = getattr(error, "filename", None) or where
        raise UserError(f"{where}: {reason}; {hint}") from error


def refusal(error: BaseException) -> str | None:
    """What the disk refuses, according to an exception or its causes; None if it is no disk's."""
    for cause in causes(error):
        if "No space left on device" in str(cause):
            return FAULTS_OF_THE_DISK[errno.ENOSPC]
        number = FAULTS_OF_TENSORFLOW.get(getattr(cause, "error_code", None))
        if reason := FAULTS_OF_THE_DISK.get(number or getattr(cause, "errno", None)):
            return reason
    return None


def check(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> None:
    """Checks that `workdir` is nobody's yet, or that of `config`.

    Raises:
      UserError: the directory cannot be read or written, belongs to another configuration, or is an
        export.
    """
    workdir = epath.Path(workdir)
    paths.refuse_patterns(workdir)
    with disk_faults(workdir, "choose another --workdir"):
        paths.try_folder(workdir)  # before data take minutes
        if (workdir / "model").exists():  # which would be taken for what is trained there
            raise UserError(
                f"{workdir} is an exported model; name it in config.init_from, and choose another "
                "--workdir"
            )
        if (workdir / "config.json").exists():
            _compare(config, workdir)
        elif workdir.exists() and (workdir / "checkpoints").exists():
            raise UserError(
                f"{workdir} has checkpoints but no config.json: restore that file, or choose "
                "another --workdir"
            )


def claim(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> None:
    """Makes `workdir` the working directory of `config`.

    Raises:
      UserError: the directory cannot be written, or belongs to another configuration.
    """
    workdir = epath.Path(workdir)
    check(config, workdir)
    with disk_faults(workdir, "choose another --workdir"):
        if hosts.is_first():
            workdir.mkdir(parents=True, exist_ok=True)
            if (workdir / "config.json").exists():
                _tell_of_more_steps(config, workdir)
            write_config(config, workdir)
    hosts.meet("claimed")


@contextlib.contextmanager
def alone(workdir: epath.PathLike) -> Iterator[None]:
    """While open, no other job can claim or train in `workdir`, which is made if it is missing.

    The first process holds a lock on it, which ends with the process, however that ends. Buckets
    and some network disks know no locks; there nothing is checked.

    Raises:
      UserError: another job holds it, or the directory cannot be made.
    """
    if paths.is_remote(workdir) or not hosts.is_first():
        yield
        return
    with disk_faults(workdir, "choose another --workdir"):
        epath.Path(workdir).mkdir(parents=True, exist_ok=True)
        folder = os.open(workdir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another job is training in {workdir}; wait until it ends, end it, or choose "
                "another --workdir"
            ) from None
        except OSError as error:
            logging.info("%s cannot be locked: %s", workdir, error)
        yield
    finally:
        os.close(folder)


def write_config(config: ml_collections.ConfigDict, folder: epath.Path) -> None:
    """Writes `folder/config.json`; a crash leaves either the old file or the new one."""
    paths.replace_text(folder / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")


def read_config(folder: epath.PathLike) -> ml_collections.ConfigDict:
    """The configuration in `folder/config.json`, locked, with tuples where it had tuples.

    Paths of a stage that are relative to the folder are resolved.

    Raises:
      UserError: there is none, it cannot be read, or it is neither a stage's nor that of a job of
        several.
    """
    path = epath.Path(folder) / "config.json"
    config = ml_collections.ConfigDict(_tuples(_read(path))).lock()
    if config.get("jobs"):
        jobs = config.jobs if isinstance(config.jobs, tuple) else (None,)
        if not all(isinstance(name, str) for name in jobs):
            raise UserError(f"{path} is damaged: jobs are no list of names; restore it")
        return config
    require(config, path, ("stage", "data.directory", "init_from"))
    return resolve(config, folder)


def require(
    config: ml_collections.ConfigDict, where: epath.PathLike, fields: Sequence[str]
) -> None:
    """Raises UserError at the first of some fields that a stored configuration lacks.

    Args:
      config: the configuration.
      where: what holds it, for the message.
      fields: such as 'data.directory'.
    """
    for field in fields:
        group = config
        for name in field.split("."):
            if not isinstance(group, ml_collections.ConfigDict) or name not in group:
                raise UserError(
                    f"{where} is damaged, or of another version: it has no field {field}; restore "
                    "it, or train anew in another --workdir"
                )
            group = group[name]


def resolve(config: ml_collections.ConfigDict, folder: epath.PathLike) -> ml_collections.ConfigDict:
    """A stage's configuration with absolute paths.

    Args:
      config: its paths that start with '..' are relative to its working directory.
      folder: this working directory.
    """

    def from_folder(path: str) -> str:
        if not path.startswith(".."):
            return path
        return os.fspath(paths.absolute(os.path.join(folder, path)))

    return map_paths(from_folder, config)


def map_paths(
    function: Callable[[str], str], config: ml_collections.ConfigDict
) -> ml_collections.ConfigDict:
    """A stage's configuration, locked, with `function` of each path in it."""
    config = config.copy_and_resolve_references().unlock()
    config.data.directory = function(config.data.directory)
    for role, path in config.init_from.items():
        config.init_from[role] = function(path)
    return config.lock()


def _read(path: epath.Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged, not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path} is damaged, no configuration but {json.dumps(fields):.40}")
    return fields


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _compare(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
    """Raises `UserError` at the first field by which `config` differs from that of `workdir`."""
    old, new = _read(workdir / "config.json"), json.loads(json.dumps(config.to_dict()))
    if ("jobs" in old) != ("jobs" in new):
        whose = "a job of several stages" if "jobs" in old else "one stage"
        raise UserError(f"{workdir} is the working directory of {whose}; choose another --workdir")
    old, new = (traverse_util.flatten_dict(fields, sep=".") for fields in (old, new))
    jobs = new.get("jobs", ())
    # Another stage has other fields: that is told, and not the first of these.
    for field in sorted(old.keys() | new.keys(), key=lambda field: (field != "stage", field)):
        if old.get(field) == new.get(field) or _may_change(field, jobs):
            continue
        if "init_from." in field and _has_gone(old.get(field)):
            continue  # it has moved, or the run needs it no more
        if field == "steps" and isinstance(old.get(field), int):
            if new[field] > old[field]:
                continue
            raise UserError(
                f"{workdir} was made for {old[field]} steps and config.steps is now {new[field]}; "
                "it may only grow"
            )
        raise UserError(
            f"{workdir} was made with another configuration: {field} was {_show(old, field)} and "
            f"is now {_show(new, field)}; set it back, or choose another --workdir"
        )


def _tell_of_more_steps(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
    """Warns where a run becomes longer, before its old configuration is replaced."""
    before = _read(workdir / "config.json").get("steps")
    if config.get("steps") != before:
        logging.warning(
            "%s was made for %d steps and goes on to %d: its rate, and a grid that doubles, are "
            "from here on those of the longer run",
            workdir,
            before,
            config.steps,
        )


def _may_change(field: str, jobs: Sequence[str]) -> bool:
    first, _, rest = field.partition(".")
    return (rest if first in jobs else field) in OPERATIONAL or first == "evaluate"


def _has_gone(path: Any) -> bool:
    """Whether a stored absolute path leads nowhere any more."""
    if not path or not isinstance(path, str) or path.startswith(".."):
        return False
    return not epath.Path(path).exists()


def _show(fields: dict[str, Any], field: str) -> str:
    return json.dumps(fields[field]) if field in fields else "absent"
