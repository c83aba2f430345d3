"""The compiled programs of a run: its first state and its step, laid out over a mesh.

What the training loop runs and what `cfpp.aot` compiles without running is the same.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import ml_collections
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cfpp import stages
from cfpp.errors import UserError
from cfpp.models import shapes
from cfpp.models.network import Network
from cfpp.parallel import mesh

INIT = 2**32 - 1  # folded into the run's key for the first state; no step has this number

# By kind of device. Left alone, the TPU's compiler gathers parameters over large slices by
# all-reduce: twice the bytes, and nothing else runs meanwhile. On a v5e these keep it from that. On
# other chips JAX 0.11's compiler refuses the second: it may hang there or give wrong results.
COMPILER_OPTIONS = {
    "TPU v5 lite": {
        "xla_enable_async_all_gather": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
        "xla_tpu_prefer_async_allgather_to_allreduce": True,
    }
}


class Program(NamedTuple):
    """A stage on a mesh.

    Attributes:
      state: its state as `jax.ShapeDtypeStruct`s with shardings.
      batch: the sharding of its batches.
      parents: the shardings of its parents' parameters by role.
      init: jitted, parents by role -> the first state.
      step: jitted, (state, batch) -> (state, metrics); the given state is donated. Its randomness
        is a function of the run's seed and `state.step`.
    """

    state: Any
    batch: NamedSharding
    parents: dict[str, Any]
    init: Callable
    step: Callable


@contextlib.contextmanager
def tracing(config: ml_collections.ConfigDict, given: Iterable[str]) -> Iterator[None]:
    """While open, what cannot be traced of a stage is told as its user's mistake.

    Args:
      config: of the stage.
      given: the roles of its parents.

    Raises:
      UserError: a parent does not fit, or the model's attention does not take its shapes.
    """
    try:
        yield
    except shapes.MismatchError as error:
        roles = ", ".join(f"{role}={config.init_from[role]}" for role in given)
        raise UserError(f"config.init_from ({roles}): {error}") from error
    except ValueError as error:
        raise UserError(f"stage {config.stage} cannot be traced: {error}") from error


def parent_shapes(stage: stages.Stage, config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The shapes of the parents' parameters that a stage would load, by role."""
    given = [role for role, path in config.init_from.items() if path]
    return nn.meta.unbox(boxed_parents(stage, config, given))


def boxed_parents(
    stage: stages.Stage, config: ml_collections.ConfigDict, roles: Iterable[str]
) -> dict[str, Any]:
    """The shapes of the parents' parameters, in boxes with their logical names."""
    network = lambda role: Network.create(stage.parents[role].model, config.pattern)
    return {role: network(role).shapes() for role in roles}


def batch_sharding(
    stage: stages.Stage, config: ml_collections.ConfigDict, device_mesh: Mesh
) -> NamedSharding:
    """The sharding of a stage's batches over a mesh, over which its networks divide too.

    Raises:
      UserError: the batch or one of the models does not divide.
    """
    mesh.check(device_mesh, config.model)
    for role, parent in stage.parents.items():
        mesh.check(device_mesh, parent.model, f"the model of config.init_from.{role}")
    return mesh.batch_sharding(device_mesh, config.batch_size, config.accumulate)


def create(
    stage: stages.Stage,
    config: ml_collections.ConfigDict,
    parents: dict[str, Any],
    device_mesh: Mesh,
) -> Program:
    """The programs of a stage.

    Args:
      stage: what `config` builds.
      config: of the stage.
      parents: the parameters of the parents by role, or their shapes.
      device_mesh: where to run.

    Raises:
      UserError: a parent does not fit, or the batch or the model do not divide over the mesh.
    """
    batches = batch_sharding(stage, config, device_mesh)
    key = jax.random.key(config.seed)

    def init(parents):
        return stage.init(jax.random.fold_in(key, INIT), parents)

    def step(state, batch):
        with jax.sharding.use_abstract_mesh(device_mesh.abstract_mesh):
            return stage.step(state, batch, jax.random.fold_in(key, state.step))

    boxed = jax.eval_shape(init, parents)
    shardings = mesh.state_shardings(boxed, device_mesh)
    state = jax.tree.map(
        lambda leaf, sharding: leaf.update(sharding=sharding), nn.meta.unbox(boxed), shardings
    )
    return Program(
        state,
        batches,
        mesh.state_shardings(boxed_parents(stage, config, parents), device_mesh),
        jax.jit(lambda parents: nn.meta.unbox(init(parents)), out_shardings=shardings),
        jax.jit(
            step,
            out_shardings=(shardings, NamedSharding(device_mesh, PartitionSpec())),
            donate_argnums=0,
            compiler_options=COMPILER_OPTIONS.get(device_mesh.devices.flat[0].device_kind),
        ),
    )
