"""The device mesh, and where parameters and batches live on it: one table for all networks.

Parameters carry logical axis names (`flax.linen.with_logical_partitioning`); `RULES` maps those to
the axes of the mesh. Optimizer states and averages mirror the parameters, so they follow.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import ml_collections
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cfpp.errors import UserError

AXES = ("data", "fsdp", "context", "tensor")

RULES = (
    ("batch", ("data", "fsdp")),
    ("embed", "fsdp"),
    ("embed_out", "tensor"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("patch", None),
    ("frequency", None),
    ("actions", None),
    ("text", None),
    ("layers", None),
)


def create(config: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config.mesh`: a size for each of `AXES`, -1 for whatever is left.

    Args:
      config: the sizes.
      devices: all there are, by default.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    sizes, devices = [config[axis] for axis in AXES], devices or jax.devices()
    shown = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 for size in sizes if size != -1):
        raise UserError(f"config.mesh is {shown}; sizes are at least 1, and at most one of them -1")
    if config.context != 1:
        raise UserError(f"config.mesh.context is {config.context}; only 1 is supported yet")
    given = math.prod(size for size in sizes if size != -1)
    if len(devices) % given or (-1 not in sizes and given != len(devices)):
        raise UserError(f"config.mesh is {shown}; it does not multiply to {len(devices)} devices")
    shape = [len(devices) // given if size == -1 else size for size in sizes]
    return Mesh(mesh_utils.create_device_mesh(shape, devices), AXES)


def batch_sharding(mesh: Mesh, batch_size: int, accumulate: int = 1) -> NamedSharding:
    """Batches, and each of their `accumulate` parts, are divided over the data and fsdp axes.

    Raises:
      UserError: the batch does not divide.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (ways * accumulate):
        parts = f"{accumulate} parts (config.accumulate) for each of " if accumulate > 1 else ""
        raise UserError(
            f"config.batch_size is {batch_size}; it must be a multiple of {parts}the {ways} "
            "devices on the mesh's data and fsdp axes"
        )
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def state_shardings(boxed: Any, mesh: Mesh) -> Any:
    """The sharding of every array of a state.

    Args:
      boxed: the state's shapes, in boxes with logical names (`jax.eval_shape` of a stage's init).
      mesh: where it will live.

    Returns:
      A tree of `NamedSharding`s like the unboxed state. An axis that its mesh axis does not divide
      is left whole.
    """

    def place(leaf):
        if not isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, PartitionSpec())
        axes = nn.logical_to_mesh_axes(leaf.names, RULES)
        # A box may hold an empty tree: a parameter that the optimizer leaves to another.
        return jax.tree.map(lambda array: _fit(mesh, axes, array.shape), leaf.value)

    return jax.tree.map(place, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def _fit(mesh: Mesh, axes: PartitionSpec, shape: tuple[int, ...]) -> NamedSharding:
    def ways(names):
        names = (names,) if isinstance(names, str) else names or ()
        return math.prod(mesh.shape[name] for name in names)

    fitting = [a if size % ways(a) == 0 else None for size, a in zip(shape, axes, strict=False)]
    return NamedSharding(mesh, PartitionSpec(*fitting))
