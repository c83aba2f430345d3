"""The device mesh, and where every array lives on it: two tables for all networks.

The mesh has the axes

    data     clips; parameters are repeated
    fsdp     clips; parameters are divided, and gathered where they are used
    context  the tokens within each frame, and, inside attention, heads (see `parallel.context`);
             parameters as by fsdp
    tensor   heads and the width of the MLPs

Parameters carry logical axis names (`flax.linen.with_logical_partitioning`), which `STORED` maps to
the axes of the mesh; optimizer states and averages mirror the parameters, so they follow. `USED`
says how parameters and activations are laid out in computation. Models and stages name logical axes
only: the mesh is the ambient one of `jax.set_mesh`, and without one nothing happens.

An array's axis that its mesh axes do not divide is divided by the first of them that do.
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import ml_collections
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from cfpp.errors import UserError

AXES = ("data", "fsdp", "context", "tensor")
BATCH = ("data", "fsdp")

STORED = {
    "embed": ("fsdp", "context"),
    "embed_out": ("tensor",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "patch": (),
    "frequency": (),
    "actions": (),
    "text": (),
    "layers": (),
    "layers_to_work_on": ("data",),  # of an optimizer that has much to do for each
}

USED = {
    "batch": BATCH,
    "tokens": ("context",),
    "heads": ("tensor",),
    "heads_within_attention": ("tensor", "context"),
    "mlp": ("tensor",),
}


def create(config: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config.mesh`: a size for each of `AXES`, -1 for whatever is left.

    Several slices of TPUs divide the data axis, as the network between them is slower.

    Args:
      config: the sizes.
      devices: all there are, by default.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or data is no multiple of the
        number of slices.
    """
    wanted, devices = [config[axis] for axis in AXES], devices or jax.devices()
    shown = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, wanted, strict=True))
    if wanted.count(-1) > 1 or any(size < 1 for size in wanted if size != -1):
        raise UserError(f"the mesh is {shown}; sizes are at least 1, and at most one of them -1")
    given = math.prod(size for size in wanted if size != -1)
    if len(devices) % given or (-1 not in wanted and given != len(devices)):
        raise UserError(f"the mesh is {shown}; it does not multiply to {len(devices)} devices")
    shape = [len(devices) // given if size == -1 else size for size in wanted]
    # Of GPUs, each machine is a slice to JAX; a single slice of TPUs may have no number.
    tpus = [device for device in devices if device.platform == "tpu"]
    slices = len({getattr(device, "slice_index", 0) for device in tpus})
    if slices < 2:
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(placed, AXES)
    data, *others = shape
    if data % slices:
        raise UserError(f"config.mesh.data is {data}; it must be a multiple of the {slices} slices")
    placed = mesh_utils.create_hybrid_device_mesh(
        (data // slices, *others), (slices, 1, 1, 1), devices, allow_split_physical_axes=True
    )
    return Mesh(placed, AXES)


def sizes(text: str) -> dict[str, int]:
    """Reads `fsdp=16,context=4`, a command line's `--mesh`: axes that it does not name have size 1.

    Raises:
      UserError: a word is not AXIS=SIZE.
    """
    found = {}
    for word in text.split(","):
        axis, _, size = word.partition("=")
        if axis not in AXES or not re.fullmatch(r"-?\d+", size):
            known = ", ".join(f"{axis}=N" for axis in AXES)
            raise UserError(f"--mesh={text}: {word!r} is none of {known}")
        if axis in found:
            raise UserError(f"--mesh={text}: {axis} is there twice; give each axis once")
        found[axis] = int(size)
    return dict.fromkeys(AXES, 1) | found


def check(mesh: Mesh, model: ml_collections.ConfigDict, name: str = "config.model") -> None:
    """Checks that a transformer's tokens and heads divide over a mesh.

    Args:
      mesh: where it will run.
      model: its attributes.
      name: what the message calls it.

    Raises:
      UserError: they do not.
    """
    for axis, (size, what) in divided(model).items():
        if size % mesh.shape[axis]:
            raise UserError(
                f"the mesh's {axis} is {mesh.shape[axis]}; it must divide the {size} {what} "
                f"of {name}"
            )


def divided(model: ml_collections.ConfigDict) -> dict[str, tuple[int, str]]:
    """How many of what the context and the tensor axis divide, of a transformer."""
    tokens = (model.height // model.patch) * (model.width // model.patch)
    return {"context": (tokens, "tokens of a frame"), "tensor": (model.heads, "heads")}


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
            "devices on the mesh's data and fsdp axes; or give some of these to context or tensor"
        )
    return NamedSharding(mesh, PartitionSpec(BATCH))


def state_shardings(boxed: Any, mesh: Mesh) -> Any:
    """The sharding of every array of a state.

    Args:
      boxed: the state's shapes, in boxes with logical names (`jax.eval_shape` of a stage's init).
      mesh: where it will live.

    Returns:
      A tree of `NamedSharding`s like the unboxed state.

    Raises:
      ValueError: a box has a name that `STORED` does not know.
    """

    def place(leaf):
        if not isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, PartitionSpec())
        if unknown := {*leaf.names} - {*STORED, None}:
            raise ValueError(f"a parameter's axes are {leaf.names}; STORED does not know {unknown}")
        spec = lambda array: _spec(leaf.names, STORED, array.shape, mesh.shape)
        # A box may hold an empty tree: a parameter that the optimizer leaves to another.
        return jax.tree.map(lambda array: NamedSharding(mesh, spec(array)), leaf.value)

    return jax.tree.map(place, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def ambient() -> jax.sharding.AbstractMesh | None:
    """The mesh that a program is being traced for; None without one, or inside `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or mesh.manual_axes else mesh


def platform() -> str:
    """The platform that a program is being traced for, which need not be this machine's."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def compute_capability() -> float:
    """The compute capability of this machine's GPU; infinite of one that has none, or no GPU."""
    try:
        return float(jax.local_devices()[0].compute_capability)
    except (AttributeError, ValueError):  # AMD's have names, such as gfx942
        return math.inf


def used(shape: tuple[int, ...], *names: str | None) -> PartitionSpec:
    """The layout, by `USED`, of an array whose axes have these logical names."""
    return _spec(names, USED, shape, ambient().shape)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Lays an activation out as `USED` says for the logical names of its axes."""
    return jax.lax.with_sharding_constraint(x, used(x.shape, *names)) if ambient() else x


def store_first(x: jax.Array, name: str) -> jax.Array:
    """Lays the first axis of an array out as `STORED` says for its name; the others stay."""
    if found := ambient():
        (first,) = _spec((name,), STORED, x.shape[:1], found.shape)
        others = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
        x = jax.lax.with_sharding_constraint(x, PartitionSpec(first, *others))
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather(parameter: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """A parameter as it is used, from how it is stored; its gradient goes the other way.

    Without the second half every device would keep the whole gradient.
    """
    return constrain(parameter, *names)


def _gather_forward(parameter, names):
    return gather(parameter, names), None


def _gather_backward(names, _, gradient):
    if mesh := ambient():
        spec = _spec(names, STORED, gradient.shape, mesh.shape)
        gradient = jax.lax.with_sharding_constraint(gradient, spec)
    return (gradient,)


gather.defvjp(_gather_forward, _gather_backward)


def _spec(names, table, shape, sizes) -> PartitionSpec:
    def fit(name, size):
        fitting, ways = [], 1
        for axis in table.get(name, ()):
            if size % (ways * sizes[axis]) == 0:
                fitting.append(axis)
                ways *= sizes[axis]
        return tuple(fitting) or None

    return PartitionSpec(*(fit(name, size) for name, size in zip(names, shape, strict=True)))


def rows(sharding: Sharding, size: int) -> list[int]:
    """The rows of an array with `size` rows that this process's devices hold, in order."""
    parts = sharding.addressable_devices_indices_map((size,)).values()
    return sorted({row for (part,) in parts for row in range(*part.indices(size))})
