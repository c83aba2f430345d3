"""Models as they are stored: averaged parameters, in a run's checkpoints or in an export."""

import contextlib
import dataclasses
import functools
import uuid
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import ml_collections
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from cfpp import paths
from cfpp.errors import UserError
from cfpp.models import shapes
from cfpp.models.network import FIELDS, Network, Params, cast_products
from cfpp.parallel import hosts
from cfpp.train import items, workdirs
from cfpp.train.items import Tree


@dataclasses.dataclass(frozen=True)
class Stored:
    """A stored model, of which nothing but the configuration is read yet; see `find`.

    Attributes:
      folder: the working directory of the stage, or the export.
      config: of the stage.
    """

    folder: epath.Path
    config: ml_collections.ConfigDict

    def network(self) -> Network:
        """The network that the parameters are of, to roll out from.

        Raises:
          UserError: the configuration is none, or that of another model.
        """
        where = self.folder / "config.json"
        workdirs.require(self.config, where, needed(self.config))
        try:
            network = Network.create(self.config.model, self.config.pattern)
            if self.config.stage == "bidirectional" and network.pattern.chunk is not None:
                raise ValueError(f"pattern.chunk of stage 0 is {network.pattern.chunk}, not null")
        except (TypeError, ValueError) as error:
            raise UserError(f"{where} is damaged, {error}; restore it") from error
        wanted = nn.meta.unbox(network.shapes())
        shapes.check(wanted, self.shapes(), self.folder, dtypes=False)
        return network

    def shapes(self) -> Tree:
        """What `load` would load, as `jax.ShapeDtypeStruct`s.

        Raises:
          UserError: it is damaged.
        """

        def read(path):
            with items.damage():
                return items.shapes_of(path / items.MODEL)

        return self._read(items.steps(self.folder / "checkpoints"), read)

    def load(self, sharding: Tree = None) -> Params:
        """Reads the averaged parameters.

        Args:
          sharding: of all parameters, or a tree of theirs; the default device if None.

        Raises:
          UserError: they are damaged.
        """
        found, last = items.steps(self.folder / "checkpoints"), self.config.get("steps", 0)
        if not items.is_own(sharding):  # all processes read
            found = hosts.from_first(found)
        if found and found[-1] < last:
            logging.warning(
                "%s is not finished: it has come to step %d of %d", self.folder, found[-1], last
            )
        return self._read(found, functools.partial(items.read_model, sharding=sharding))

    def _read(self, found: Sequence[int], read: Callable[[epath.Path], Tree]) -> Tree:
        """What `read` makes of an export, or of the newest intact one of checkpoints `found`."""
        if not (self.folder / items.MODEL).exists():
            return items.newest_intact(self.folder / "checkpoints", found, read)[1]
        try:
            return read(self.folder)
        except items.DamageError as error:
            raise UserError(f"{self.folder} is damaged ({error}); export it again") from error


def find(path: epath.PathLike) -> Stored:
    """Finds a stored model.

    Args:
      path: the working directory of a stage, finished or running; an export; or the working
        directory of a job of several stages, whose last is meant.

    Raises:
      UserError: there is no model.
    """
    path = paths.known(path)
    if not path.exists():
        raise UserError(
            f"{path} does not exist, or may not be read; give a working directory or an exported "
            "model"
        )
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
        return find(last)
    if not (path / items.MODEL).exists() and not items.steps(path / "checkpoints"):
        if (path / items.FINGERPRINT).exists():
            raise UserError(f"{path} is damaged (its parameters are missing); export it again")
        raise UserError(f"{path} has no checkpoint yet; train it first")
    return Stored(path, config)


def needed(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """The fields that a stage's stored configuration must have for a rollout of its model."""
    # In a student, guidance is distilled; a bidirectional model is sampled without, in clips.
    own = {"ar_diffusion": ("guidance",), "bidirectional": ("data.frames",)}
    return (*FIELDS, "pattern", "shift", "data.name", "data.channels", *own.get(config.stage, ()))


def export(path: epath.PathLike, out: epath.PathLike, dtype: str = "float32") -> None:
    """Writes the model of `path` and its configuration to the new folder `out`.

    Its kernels (`config.model.attention`) are those of the machine that it was trained on, and
    'auto' in the export.

    Args:
      path: see `find`.
      out: a new folder.
      dtype: of the matrices in the blocks, nearly all parameters. A model that computes in bfloat16
        takes them in that anyway: then its output stays the same.

    Raises:
      UserError: `out` exists, cannot be written, or there is no model or it is damaged.
    """
    paths.refuse_existing(out)
    paths.refuse_patterns(out)
    model = find(path)
    workdirs.require(model.config, model.folder / "config.json", needed(model.config))
    config = model.config.copy_and_resolve_references().unlock()
    config.model.attention = "auto"
    _write(config, cast_products(model.load(items.host_memory()), dtype), out)


def write(config: ml_collections.ConfigDict, params: Params, out: epath.PathLike) -> None:
    """Writes parameters from anywhere, such as Wan's, as an export that `init_from` may name.

    Args:
      config: of the stage that they count as coming from; its `model` is theirs.
      params: unboxed, arrays of NumPy or JAX.
      out: a new folder.

    Raises:
      UserError: `out` exists or cannot be written.
      MismatchError: the parameters are not of `config.model`.
    """
    paths.refuse_existing(out)
    paths.refuse_patterns(out)
    network = Network.create(config.model, config.pattern)
    shapes.check(nn.meta.unbox(network.shapes()), params, "the given network")
    _write(config, jax.device_put(params, items.host_memory()), out)


def _write(config: ml_collections.ConfigDict, params: Params, out: epath.PathLike) -> None:
    out = epath.Path(out)
    temporary = out.with_name(f"{out.name}.{uuid.uuid4().hex[:8]}.tmp")
    handler = ocp.CompositeCheckpointHandler()
    with contextlib.ExitStack() as stack:
        stack.enter_context(items.saving(out))
        checkpointer = stack.enter_context(ocp.Checkpointer(handler))
        stack.callback(temporary.rmtree, missing_ok=True)  # after a failure
        temporary.mkdir(parents=True, exist_ok=True)
        items.check_room(temporary, params)
        checkpointer.save(
            paths.absolute(temporary),
            args=ocp.args.Composite(
                model=ocp.args.StandardSave(params),
                fingerprint=ocp.args.JsonSave({items.MODEL: items.sum_of_bits(params)}),
            ),
            force=True,  # the folder is there: it has shown that it can be written
        )
        workdirs.write_config(config, temporary)
        temporary.rename(out)
