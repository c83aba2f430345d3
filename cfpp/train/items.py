"""What checkpoints and exports hold, how it is read and written, and how damage is told.

A checkpoint `checkpoints/<step>/` of a run holds the items

    model        the averaged parameters, `state.ema`: all that later stages and rollout need
    state        everything else in the state
    data         the position of the input pipeline
    fingerprint  sums over the bits of `model` and `state`, to tell damage when reading

An export is a folder with the same `model` and `fingerprint` and the `config.json`.
"""

import contextlib
import dataclasses
import errno
import shutil
from collections.abc import Callable, Iterator, Sequence
from logging import LogRecord, getLogger
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from cfpp import paths
from cfpp.errors import UserError, causes, first_line
from cfpp.train import workdirs

Tree = Any
MODEL, STATE, DATA, FINGERPRINT = "model", "state", "data", "fingerprint"


def _is_news(record: LogRecord) -> bool:
    """False for Orbax's tracebacks: it raises these exceptions too, and they are told in a line."""
    return not (record.exc_info and "orbax" in record.pathname + record.getMessage())


for _logger in ("absl", "asyncio"):
    getLogger(_logger).addFilter(_is_news)


# Words in errors of JAX and TensorStore that mean "not to be read now", not "damaged".
PASSING = (
    "RESOURCE_EXHAUSTED",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "libcurl",
)
# The same by the numbers of TensorFlow, which reads buckets where it is installed: cancelled, too
# late, not permitted, exhausted, aborted after all attempts, unavailable, unauthenticated.
PASSING_CODES = (1, 4, 7, 8, 10, 14, 16)


class DamageError(Exception):
    """A checkpoint that cannot be read, or not as it was written."""


class NotNowError(UserError):
    """A checkpoint that cannot be read now, for want of memory, rights or a network."""


def steps(directory: epath.PathLike) -> list[int]:
    """The steps of the complete checkpoints in a folder, oldest first."""
    directory = epath.Path(directory)
    if not directory.is_dir():
        return []
    # In a bucket, where nothing can be renamed, unfinished ones have this name too.
    is_complete = lambda path: path.name.isdecimal() and ocp.utils.is_checkpoint_finalized(path)
    return sorted(int(path.name) for path in directory.iterdir() if is_complete(path))


def read(folder: epath.Path, **items: ocp.args.CheckpointArgs) -> dict[str, Tree]:
    """Reads items of a checkpoint or export.

    Not by a `Checkpointer`, at the end of which all processes wait for each other: the first may
    read alone, and one that fails does not come there.
    """
    handler = ocp.CompositeCheckpointHandler()
    return handler.restore(paths.absolute(folder), args=ocp.args.Composite(**items))


def shapes_of(item: epath.Path) -> Tree:
    """The stored tree with `jax.ShapeDtypeStruct`s for arrays."""
    if not (item / "manifest.ocdbt").exists():  # TensorStore would tell that by many tracebacks
        raise DamageError(f"{item / 'manifest.ocdbt'} is missing")
    metadata = ocp.StandardCheckpointHandler().metadata(paths.absolute(item))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), metadata.tree)


def read_model(folder: epath.Path, sharding: Tree = None) -> Tree:
    """The item `model` of a checkpoint or export."""
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with damage(together=not is_own(sharding)):
        stored = shapes_of(folder / MODEL)
        shardings = jax.tree.broadcast(sharding, stored)
        template = jax.tree.map(lambda x, where: x.update(sharding=where), stored, shardings)
        restored = read(
            folder, model=ocp.args.StandardRestore(template), fingerprint=ocp.args.JsonRestore()
        )
    with damage():
        check_fingerprint({MODEL: sum_of_bits(restored[MODEL])}, restored[FINGERPRINT])
    return restored[MODEL]


def is_own(sharding: Tree) -> bool:
    """Whether what is laid out like this is this process's alone; so it is with no sharding."""
    return all(where.is_fully_addressable for where in jax.tree.leaves(sharding))


def host_memory() -> jax.sharding.Sharding:
    """The host's memory: a model may be too large for one device of those that it was trained on.

    Where JAX is kept from it (`JAX_PLATFORMS`), the default device.
    """
    try:
        devices = jax.local_devices(backend="cpu")
    except RuntimeError:
        devices = jax.local_devices()
    return jax.sharding.SingleDeviceSharding(devices[0])


def newest_intact(
    directory: epath.Path, found: Sequence[int], read: Callable[[epath.Path], Tree]
) -> tuple[int, Tree] | None:
    """The newest checkpoint that can be read, and what was read; None if there is none at all.

    Args:
      directory: that of the checkpoints.
      found: their steps, oldest first. Where all processes read together it is the same in all: a
        network disk may show a new checkpoint to one of them before the others.
      read: what to do with each.

    Raises:
      UserError: there are checkpoints, but none can be read.
    """
    first_damage = None
    for step in reversed(found):
        path = directory / str(step)
        try:
            return step, read(path)
        except DamageError as error:
            said = str(error)  # the error itself holds, by its traceback, what was read
            first_damage = first_damage or said
            logging.warning("passing over checkpoint %s: damaged (%s)", path, said)
    if first_damage is None:
        return None
    raise UserError(
        f"no checkpoint in {directory} can be read ({first_damage}); "
        "move this folder away to start anew"
    )


def inspect(state: Tree) -> tuple[bool, dict[str, int]]:
    """Looks a state through before it is saved, or after it was read.

    Returns:
      Whether all its numbers are finite, and its fingerprint: for `model` and `state` the sum of
      all bits, taken as unsigned integers, modulo 2**32.
    """
    saved = {MODEL: state.ema, STATE: without_ema(state)}
    # On the host: compiling a sum for every shape takes seconds, and saving copies it all anyway.
    floats = (x for x in _pieces(saved) if jnp.issubdtype(x.dtype, jnp.inexact))
    finite = all(np.all(np.isfinite(x)) for x in floats)
    return everywhere(finite), {name: sum_of_bits(item) for name, item in saved.items()}


def without_ema(state: Tree) -> dict[str, Tree]:
    """The item `state` of a state: its fields by name, but for that of `model`."""
    names = [field.name for field in dataclasses.fields(state) if field.name != "ema"]
    return {name: getattr(state, name) for name in names}


def sum_of_bits(tree: Tree) -> int:
    """A fingerprint of one item: see `inspect`."""
    sums = (np.sum(x.view(f"uint{8 * x.dtype.itemsize}"), dtype=np.uint32) for x in _pieces(tree))
    own = sum(map(int, sums)) % 2**32
    is_whole = all(leaf.is_fully_addressable for leaf in jax.tree.leaves(tree))
    return own if is_whole else _total(own)


def _pieces(tree: Tree) -> Iterator[np.ndarray]:
    """The parts of all arrays; over all processes, each part once."""
    for leaf in jax.tree.leaves(tree):
        yield from (np.asarray(x.data) for x in leaf.addressable_shards if x.replica_id == 0)


def _total(number: int) -> int:
    """The sum over all processes, modulo 2**32."""
    numbers = multihost_utils.process_allgather(np.uint32(number))
    return int(np.sum(numbers, dtype=np.uint32))


def everywhere(is_so: bool) -> bool:
    """Whether something is so in all processes, which ask together."""
    return not _total(0 if is_so else 1)


def check_fingerprint(found: dict[str, int], wanted: dict[str, int]) -> None:
    """Raises `DamageError` if the fingerprint of an item that was read is not what was saved."""
    for name, value in found.items():
        if value != wanted[name]:
            raise DamageError(f"the bits of {name} have changed")


@contextlib.contextmanager
def damage(together: bool = False) -> Iterator[None]:
    """Turns whatever goes wrong in reading into a `DamageError` of one line, or a `NotNowError`.

    Args:
      together: all processes read, each its part; what one of them cannot read is damaged for all.
        Otherwise they would go on to different checkpoints, and compare these.
    """
    cause = None
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = error
    if together and not everywhere(cause is None):
        cause = cause or DamageError("another process cannot read its part")
    if cause:
        line = first_line(cause)
        line = line if len(line) < 160 else line[:157] + "..."
        if _passes(cause):
            raise NotNowError(
                f"a checkpoint cannot be read now: {line}; it may be whole: mend that, then run "
                "the same command again"
            ) from cause
        raise DamageError(line) from cause


def _passes(error: BaseException) -> bool:
    """Whether what went wrong, or a cause of it, is no fault of what was read."""
    kinds = MemoryError | PermissionError | TimeoutError | ConnectionError
    return any(
        isinstance(cause, kinds)
        or getattr(cause, "error_code", None) in PASSING_CODES
        or any(word in str(cause) for word in PASSING)
        for cause in causes(error)
    )


def check_room(directory: epath.Path, tree: Tree) -> None:
    """Refuses to start what the disk has no room for. (Orbax hardly packs floats any smaller.)"""
    if paths.is_remote(directory):
        return
    needed, free = sum(x.nbytes for x in jax.tree.leaves(tree)), shutil.disk_usage(directory).free
    if needed > free:
        raise OSError(
            errno.ENOSPC, f"No space left on device for {needed:,} bytes ({free:,} are free)"
        )


@contextlib.contextmanager
def saving(directory: epath.Path) -> Iterator[None]:
    """Turns a disk's refusal, however Orbax wraps it, into a `UserError`."""
    try:
        yield
    except Exception as error:
        reason = workdirs.refusal(error)
        if reason is None:
            raise
        kept = steps(directory)
        last = f"; the last complete one is of step {kept[-1]}" if kept else ""
        raise UserError(
            f"cannot save a checkpoint in {directory}: {reason}{last}; mend that, then run the "
            "same command again"
        ) from error
