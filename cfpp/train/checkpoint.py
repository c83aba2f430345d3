"""Checkpoints of a run (state and data iterator), and models read from them.

`workdir/checkpoints/<step>/` is written by Orbax in the background and appears, complete, under
that name at once. It holds the items

    model        the averaged parameters, `state.ema`: all that later stages and rollout need
    state        everything else in the state
    data         the position of the input pipeline
    fingerprint  sums over the bits of `model` and `state`, to tell damage when reading

An export is a folder with the same `model` and `fingerprint` and the `config.json`.
"""

import contextlib
import dataclasses
import errno
import functools
import itertools
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from logging import LogRecord, getLogger
from typing import Any, NamedTuple

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from cfpp import paths
from cfpp.errors import UserError, causes, first_line
from cfpp.models import shapes
from cfpp.models.network import FIELDS, Network, Params
from cfpp.parallel import hosts
from cfpp.train import workdirs

Tree = Any
MODEL, STATE, DATA, FINGERPRINT = "model", "state", "data", "fingerprint"


def _is_news(record: LogRecord) -> bool:
    """False for Orbax's tracebacks: it raises these exceptions too, and they are told in a line."""
    return not (record.exc_info and "orbax" in record.pathname + record.getMessage())


for _logger in ("absl", "asyncio"):
    getLogger(_logger).addFilter(_is_news)


# In what JAX and TensorStore say where a checkpoint may be whole, and another time can be read.
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


class _Manager(ocp.CheckpointManager):
    """Orbax's, which does not ask for itself whether the job is to end.

    JAX counts questions: `hosts.terminated` asks once a step, and one with a number of its own that
    comes between would let a SIGTERM be answered much later, or never.
    """

    def reached_preemption(self, step: int) -> bool:
        """False."""
        return False


class Checkpoints:
    """The checkpoints of one run: saved in the background, the newest intact one restored.

    Attributes:
      directory: the folder that holds one folder a step.
    """

    def __init__(self, workdir: epath.PathLike, keep: int):
        """Opens `workdir/checkpoints`, which is made if missing.

        Args:
          workdir: the working directory.
          keep: the newest so many checkpoints are kept.
        """
        self.directory = epath.Path(workdir) / "checkpoints"
        for path in self.directory.iterdir() if self.directory.is_dir() else ():
            if ocp.utils.is_tmp_checkpoint(path):
                logging.warning("removing %s: its writing was interrupted", path)
        self._manager = _Manager(
            self.directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
            item_handlers=_handlers(),
        )

    def restore(self, template: Tree, data: grain.DatasetIterator) -> Tree | None:
        """Restores the newest intact checkpoint; damaged newer ones are put aside, saying so.

        Args:
          template: the state as `jax.ShapeDtypeStruct`s with shardings.
          data: the input pipeline, which is set to where it was.

        Returns:
          The state, or None if there is no checkpoint.

        Raises:
          UserError: the checkpoint is of another model, or none is intact.
        """
        restore = functools.partial(_restore, template=template, data=data)
        found = _newest_intact(self.directory, hosts.from_first(steps(self.directory)), restore)
        if found is None:
            return None
        newest, state = found
        if hosts.is_first():
            for step in steps(self.directory):
                if step > newest:
                    _put_aside(self.directory / str(step))
        hosts.meet("restored")
        self._manager.reload()
        return state

    def save(self, step: int, state: Tree, fingerprint: dict[str, int], data) -> None:
        """Starts to save; returns once nothing depends on `state`'s buffers any more.

        Args:
          step: optimizer steps taken.
          state: with fields `ema` and others.
          fingerprint: of it, see `inspect`.
          data: the input pipeline.

        Raises:
          UserError: the disk does not take this checkpoint, or did not take the one before.
        """
        with _saving(self.directory):
            self._manager.wait_until_finished()
            _check_room(self.directory, state)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    model=ocp.args.StandardSave(state.ema),
                    state=ocp.args.StandardSave(_without_ema(state)),
                    data=ocp.args.JsonSave(data.get_state()),
                    fingerprint=ocp.args.JsonSave(fingerprint),
                ),
            )

    def wait(self) -> None:
        """Waits until everything is on the disk.

        Raises:
          UserError: the disk did not take it.
        """
        with _saving(self.directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the background threads; an error of theirs was or is told by `wait`."""
        try:
            self._manager.close()
        except Exception as error:
            logging.info("closing %s: %s", self.directory, error)


def _restore(path: epath.Path, template: Tree, data: grain.DatasetIterator) -> Tree:
    """What `Checkpoints.restore` restores, from one checkpoint."""
    wanted = {MODEL: template.ema, STATE: _without_ema(template)}
    with _damage(together=True):
        for name in (MODEL, STATE):
            shapes.check(wanted[name], _shapes(path / name), f"checkpoint {path}")
        restored = _read(
            path,
            model=ocp.args.StandardRestore(wanted[MODEL]),
            state=ocp.args.StandardRestore(wanted[STATE]),
            data=ocp.args.JsonRestore(),
            fingerprint=ocp.args.JsonRestore(),
        )
    with _damage():
        state = template.replace(ema=restored[MODEL], **restored[STATE])
        _check_fingerprint(inspect(state)[1], restored[FINGERPRINT])
        data.set_state(restored[DATA])
    return state


def inspect(state: Tree) -> tuple[bool, dict[str, int]]:
    """Looks a state through before it is saved, or after it was read.

    Returns:
      Whether all its numbers are finite, and its fingerprint: for `model` and `state` the sum of
      all bits, taken as unsigned integers, modulo 2**32.
    """
    items = {MODEL: state.ema, STATE: _without_ema(state)}
    # On the host: compiling a sum for every shape takes seconds, and saving copies it all anyway.
    floats = (x for x in _pieces(items) if jnp.issubdtype(x.dtype, jnp.inexact))
    finite = all(np.all(np.isfinite(x)) for x in floats)
    return _everywhere(finite), {name: _sum_of_bits(item) for name, item in items.items()}


def _sum_of_bits(tree: Tree) -> int:
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


def _everywhere(is_so: bool) -> bool:
    """Whether something is so in all processes, which ask together."""
    return not _total(0 if is_so else 1)


def _check_fingerprint(found: dict[str, int], wanted: dict[str, int]) -> None:
    for name, value in found.items():
        if value != wanted[name]:
            raise DamageError(f"the bits of {name} have changed")


def steps(directory: epath.PathLike) -> list[int]:
    """The steps of the complete checkpoints in a folder, oldest first."""
    directory = epath.Path(directory)
    if not directory.is_dir():
        return []
    # In a bucket, where nothing can be renamed, unfinished ones have this name too.
    is_complete = lambda path: path.name.isdecimal() and ocp.utils.is_checkpoint_finalized(path)
    return sorted(int(path.name) for path in directory.iterdir() if is_complete(path))


def is_finished(workdir: epath.PathLike, last_step: int) -> bool:
    """Whether the checkpoint of a run's last step is there and its model intact.

    All processes ask together, and get the same answer.
    """
    checkpoints = epath.Path(workdir) / "checkpoints"
    is_intact = last_step in steps(checkpoints)
    if is_intact:
        try:
            _read_model(checkpoints / str(last_step), _host())
        except (DamageError, NotNowError):
            is_intact = False
    return _everywhere(is_intact)


def load_model(
    path: epath.PathLike, sharding: Tree = None
) -> tuple[ml_collections.ConfigDict, Tree]:
    """Loads the averaged parameters of a finished or running stage.

    Args:
      path: a stage's working directory, an export, or the working directory of a job of several
        stages (the last of them is taken).
      sharding: of all parameters, or a tree of theirs; the default device if None.

    Returns:
      The stage's configuration and the parameters.

    Raises:
      UserError: nothing is there, or it is damaged.
    """
    folder, config = find_model(path)
    return config, _load(folder, config, sharding)


def _load(folder: epath.Path, config: ml_collections.ConfigDict, sharding: Tree = None) -> Params:
    found, last = steps(folder / "checkpoints"), config.get("steps", 0)
    if not _is_own(sharding):  # all processes read
        found = hosts.from_first(found)
    if found and found[-1] < last:
        logging.warning("%s is not finished: it has come to step %d of %d", folder, found[-1], last)
    return _read_stored(folder, found, functools.partial(_read_model, sharding=sharding))


def find_model(path: epath.PathLike) -> tuple[epath.Path, ml_collections.ConfigDict]:
    """The folder of the stage or export that `path` means, and its configuration.

    Raises:
      UserError: there is no model.
    """
    path = epath.Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; give a working directory or an exported model")
    if not (path / "config.json").exists():
        raise UserError(f"{path} has no config.json: it is no working directory and no export")
    config = workdirs.read_config(path)
    if "jobs" in config:
        last = path / config.jobs[-1]
        if not (last / "config.json").exists():
            raise UserError(
                f"{path} has not come to its last stage yet; train on, or give the working "
                f"directory of an earlier one, such as {path / config.jobs[0]}"
            )
        return find_model(last)
    if not (path / MODEL).exists() and not steps(path / "checkpoints"):
        raise UserError(f"{path} has no checkpoint yet; train it first")
    return path, config


def needed(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """The fields that a stage's stored configuration must have for a rollout of its model."""
    # In a student, guidance is distilled; a bidirectional model is sampled without, in clips.
    own = {"ar_diffusion": ("guidance",), "bidirectional": ("data.frames",)}
    return (*FIELDS, "pattern", "shift", "data.name", *own.get(config.stage, ()))


class Stored(NamedTuple):
    """A stored model whose parameters are not read yet.

    Attributes:
      network: the network that they are of.
      config: of the stage.
      folder: the working directory of the stage, or the export.
    """

    network: Network
    config: ml_collections.ConfigDict
    folder: epath.Path

    def load(self, sharding: Tree = None) -> Params:
        """Reads the averaged parameters; `sharding` as of `load_model`.

        Raises:
          UserError: they are damaged.
        """
        return _load(self.folder, self.config, sharding)


def open_model(path: epath.PathLike) -> Stored:
    """Opens a model to roll out from: all but its parameters, whose shapes are compared.

    Args:
      path: as of `load_model`.

    Raises:
      UserError: there is no model, or its configuration is none, or that of another one.
    """
    folder, config = find_model(path)
    where = folder / "config.json"
    workdirs.require(config, where, needed(config))
    try:
        network = Network.create(config.model, config.pattern)
    except ValueError as error:
        raise UserError(f"{where} is damaged, {error}; restore it") from error
    shapes.check(nn.meta.unbox(network.shapes()), _stored_shapes(folder), folder)
    return Stored(network, config, folder)


def model_shapes(path: epath.PathLike) -> Tree:
    """What `load_model` would load, as `jax.ShapeDtypeStruct`s."""
    return _stored_shapes(find_model(path)[0])


def _stored_shapes(folder: epath.Path) -> Tree:
    def read(path):
        with _damage():
            return _shapes(path / MODEL)

    return _read_stored(folder, steps(folder / "checkpoints"), read)


def export(path: epath.PathLike, out: epath.PathLike) -> None:
    """Writes the model of `path` and its configuration to the new folder `out`.

    Raises:
      UserError: `out` exists, cannot be written, or there is no model.
    """
    _refuse_existing(out)
    config, params = load_model(path, _host())
    _write_model(config, params, out)


def write_model(config: ml_collections.ConfigDict, params: Params, out: epath.PathLike) -> None:
    """Writes parameters from anywhere, such as Wan's, as an export that `init_from` may name.

    Args:
      config: of the stage that they count as coming from; its `model` is theirs.
      params: unboxed, arrays of NumPy or JAX.
      out: a new folder.

    Raises:
      UserError: `out` exists or cannot be written.
      MismatchError: the parameters are not of `config.model`.
    """
    _refuse_existing(out)
    network = Network.create(config.model, config.pattern)
    shapes.check(nn.meta.unbox(network.shapes()), params, "the given network")
    _write_model(config, jax.device_put(params, _host()), out)


def _refuse_existing(out: epath.PathLike) -> None:
    if epath.Path(out).exists():
        raise UserError(f"{out} exists and is not overwritten; choose another --out")


def _write_model(config: ml_collections.ConfigDict, params: Params, out: epath.PathLike) -> None:
    out = epath.Path(out)
    temporary = out.with_name(f"{out.name}.{uuid.uuid4().hex[:8]}.tmp")
    handler = ocp.CompositeCheckpointHandler(**_handlers())
    with _saving(out), ocp.Checkpointer(handler) as checkpointer, contextlib.ExitStack() as stack:
        stack.callback(temporary.rmtree, missing_ok=True)  # after a failure
        temporary.mkdir(parents=True, exist_ok=True)
        _check_room(temporary, params)
        checkpointer.save(
            paths.absolute(temporary),
            args=ocp.args.Composite(
                model=ocp.args.StandardSave(params),
                fingerprint=ocp.args.JsonSave({MODEL: _sum_of_bits(params)}),
            ),
            force=True,  # the folder is there: it has shown that it can be written
        )
        workdirs.write_config(config, temporary)
        temporary.rename(out)


def _host() -> jax.sharding.Sharding:
    """The host's memory: a model may be too large for one device of those that it was trained on.

    Where JAX is kept from it (`JAX_PLATFORMS`), the default device.
    """
    try:
        devices = jax.local_devices(backend="cpu")
    except RuntimeError:
        devices = jax.local_devices()
    return jax.sharding.SingleDeviceSharding(devices[0])


def _handlers() -> dict[str, ocp.CheckpointHandler]:
    return {
        MODEL: ocp.StandardCheckpointHandler(),
        STATE: ocp.StandardCheckpointHandler(),
        DATA: ocp.JsonCheckpointHandler(),
        FINGERPRINT: ocp.JsonCheckpointHandler(),
    }


def _read(folder: epath.Path, **items: ocp.args.CheckpointArgs) -> dict[str, Tree]:
    """Reads items of a checkpoint or export.

    Not by a `Checkpointer`, at the end of which all processes wait for each other: the first may
    read alone, and one that fails does not come there.
    """
    handler = ocp.CompositeCheckpointHandler(**_handlers())
    return handler.restore(paths.absolute(folder), args=ocp.args.Composite(**items))


def _shapes(item: epath.Path) -> Tree:
    """The stored tree with `jax.ShapeDtypeStruct`s for arrays."""
    metadata = ocp.StandardCheckpointHandler().metadata(paths.absolute(item))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), metadata.tree)


def _read_model(folder: epath.Path, sharding: Tree = None) -> Tree:
    """The item `model` of a checkpoint or export."""
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with _damage(together=not _is_own(sharding)):
        stored = _shapes(folder / MODEL)
        shardings = jax.tree.broadcast(sharding, stored)
        template = jax.tree.map(lambda x, where: x.update(sharding=where), stored, shardings)
        restored = _read(
            folder, model=ocp.args.StandardRestore(template), fingerprint=ocp.args.JsonRestore()
        )
    with _damage():
        _check_fingerprint({MODEL: _sum_of_bits(restored[MODEL])}, restored[FINGERPRINT])
    return restored[MODEL]


def _is_own(sharding: Tree) -> bool:
    """Whether what is laid out like this is this process's alone; so it is with no sharding."""
    return all(where.is_fully_addressable for where in jax.tree.leaves(sharding))


def _read_stored(
    folder: epath.Path, found: Sequence[int], read: Callable[[epath.Path], Tree]
) -> Tree:
    """What `read` makes of an export, or of the newest intact one of a run's checkpoints `found`.

    Raises:
      UserError: it is damaged.
    """
    if not (folder / MODEL).exists():
        return _newest_intact(folder / "checkpoints", found, read)[1]
    try:
        return read(folder)
    except DamageError as error:
        raise UserError(f"{folder} is damaged ({error}); export it again") from error


def _newest_intact(
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
            damage = str(error)  # the error itself holds, by its traceback, what was read
            first_damage = first_damage or damage
            logging.warning("passing over checkpoint %s: damaged (%s)", path, damage)
    if first_damage is None:
        return None
    raise UserError(
        f"no checkpoint in {directory} can be read ({first_damage}); "
        "move this folder away to start anew"
    )


def _put_aside(path: epath.Path) -> None:
    """Renames a damaged checkpoint, so that its step can be saved again and nothing is lost."""
    for number in itertools.count(1):
        aside = path.parent / f"damaged_{path.name}_{number}"
        if not aside.exists():
            path.rename(aside)
            logging.warning("renamed the damaged checkpoint to %s", aside)
            return


@contextlib.contextmanager
def _damage(together: bool = False) -> Iterator[None]:
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
    if together and not _everywhere(cause is None):
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


def _check_room(directory: epath.Path, tree: Tree) -> None:
    """Refuses to start what the disk has no room for. (Orbax hardly packs floats any smaller.)"""
    if paths.is_remote(directory):
        return
    needed, free = sum(x.nbytes for x in jax.tree.leaves(tree)), shutil.disk_usage(directory).free
    if needed > free:
        raise OSError(
            errno.ENOSPC, f"No space left on device for {needed:,} bytes ({free:,} are free)"
        )


@contextlib.contextmanager
def _saving(directory: epath.Path) -> Iterator[None]:
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


def _without_ema(state: Tree) -> dict[str, Tree]:
    names = [field.name for field in dataclasses.fields(state) if field.name != "ema"]
    return {name: getattr(state, name) for name in names}
