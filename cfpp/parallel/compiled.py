"""Reading programs: the work in a jaxpr, the collectives in the text of a compiled program.

XLA's own cost analysis counts the body of a loop once and a Pallas kernel not at all. So numbers
come from elsewhere: operations from the jaxpr, where a scan says its length and a kernel its cost,
and communication from the compiled text, every instruction times the trips of the loops around it.
A loop whose length is known only at run time counts as one turn in both.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip

KEPT = ("dot_general", "conv_general_dilated", "pallas_call", "scan", "while")  # see `arrays`


def flops(jaxpr: core.Jaxpr) -> float:
    """Floating-point operations of matrix products, convolutions and kernels, of all devices.

    The body of a `shard_map` counts once for each device.
    """
    return sum(map(_equation_flops, jaxpr.eqns))


def _equation_flops(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    shapes = [getattr(variable.aval, "shape", ()) for variable in equation.invars]
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        depth = math.prod(shapes[0][axis] for axis in contracted)
        return 2.0 * depth * math.prod(equation.outvars[0].aval.shape)
    if name == "conv_general_dilated":
        outputs = equation.outvars[0].aval.shape
        features = outputs[params["dimension_numbers"].out_spec[1]]
        return 2.0 * math.prod(outputs) * math.prod(shapes[1]) / features
    if name == "pallas_call":
        estimate = params["cost_estimate"]
        if estimate is None:
            raise ValueError(f"kernel {params['name']!r} has no cost estimate")
        return float(estimate.flops)
    inner = [flops(jaxpr) for jaxpr in _inner(params)]
    if name == "cond":
        return max(inner)
    times = 1
    if name == "scan":
        times = params["length"]
    if name == "shard_map":
        times = params["mesh"].size
    return times * sum(inner)


class Array(NamedTuple):
    """Arrays of a program, as it is before it is compiled.

    Attributes:
      nbytes: that each device holds of one of them, at least: all devices may not divide it.
      shape: of the whole, or in the body of a `shard_map` of a device's part.
      origin: what makes it.
      count: how many alike are made at once.
    """

    nbytes: float
    shape: str
    origin: str
    count: int


def arrays(jaxpr: core.Jaxpr, devices: int) -> list[Array]:
    """What a program keeps in memory whatever the compiler joins, largest together first.

    That is what matrix products, convolutions, kernels and loops give out, the last with all that
    they stack up for a backward pass. What is computed from it number by number need not be kept.

    Args:
      jaxpr: of the whole program.
      devices: that it runs on.
    """
    rows = dict.fromkeys(_arrays(jaxpr, devices))
    return sorted(rows, key=lambda array: -array.nbytes * array.count)


def _arrays(jaxpr: core.Jaxpr, devices: int) -> Iterator[Array]:
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in KEPT:
            made = collections.Counter(variable.aval for variable in equation.outvars)
            origin = f"{equation.source_info.name_stack}/{name}".removeprefix("/")
            for aval, count in made.items():
                if hasattr(aval, "dtype"):
                    nbytes = aval.size * aval.dtype.itemsize / devices
                    shape = aval.str_short(short_dtypes=True).partition("{")[0]
                    yield Array(nbytes, shape, origin, count)
        if name != "pallas_call":
            for inner in _inner(equation.params):
                yield from _arrays(inner, 1 if name == "shard_map" else devices)


def _inner(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


@dataclasses.dataclass(frozen=True)
class Collective:
    """Communication of one kind, size and direction.

    Attributes:
      kind: 'all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all' or 'collective-permute'.
      axes: of the mesh, along which devices exchange.
      shape: of the array that a device has before a reduction and after anything else, as HLO
        writes it; several that go together are joined by '+'.
      received: bytes that each device receives each time, by the ring algorithm: g - 1 parts of the
        g of a group, twice that for an all-reduce.
      times: how often a step does it.
    """

    kind: str
    axes: tuple[str, ...]
    shape: str
    received: float
    times: int


def collectives(text: str, mesh: jax.sharding.Mesh) -> list[Collective]:
    """The collectives of a compiled program, from `compiled.as_text()`, largest in total first.

    Args:
      text: the optimised HLO.
      mesh: that the program was compiled for.
    """
    computations, entry = _computations(text)
    found = collections.Counter()
    for name, times in _times(computations, entry).items():
        for instruction in computations[name].values():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in _RECEIVED or _continues(instruction, computations[name]):
                continue
            shapes = instruction.shapes
            if instruction.opcode == "all-gather-start":
                shapes = shapes[len(shapes) // 2 :]  # after the operands
            elif instruction.opcode == "collective-permute-start":
                shapes = shapes[1:2]  # between the operand and two counters
            elif kind == "reduce-scatter":
                shapes = [computations[name][operand].shapes[0] for operand in instruction.operands]
            elif kind == "all-reduce" and "all-reduce-scatter" in name:
                kind = "reduce-scatter"  # a fusion of an all-reduce and a slice
            group = _group(instruction.text, mesh)
            if axes := _axes(group, mesh):
                received = sum(map(_nbytes, shapes)) * _RECEIVED[kind](len(group))
                found[Collective(kind, axes, "+".join(shapes), received, 0)] += times
    rows = [dataclasses.replace(row, times=times) for row, times in found.items()]
    return sorted(rows, key=lambda row: -row.received * row.times)


def _continues(instruction: "_Instruction", computation: dict[str, "_Instruction"]) -> bool:
    """Whether a collective that goes on beside other work, in several fusions, began in another."""
    starts = any('"AsyncCollectiveStart"' in other.text for other in computation.values())
    return "chain_id=" in instruction.text and not starts


_RECEIVED = {
    "all-gather": lambda g: (g - 1) / g,
    "reduce-scatter": lambda g: (g - 1) / g,
    "all-reduce": lambda g: 2 * (g - 1) / g,
    "all-to-all": lambda g: (g - 1) / g,
    "collective-permute": lambda g: 1.0,
}


@dataclasses.dataclass(frozen=True)
class _Instruction:
    opcode: str
    shapes: tuple[str, ...]  # of the result or, where that is a tuple, of its elements
    operands: tuple[str, ...]
    text: str

    def called(self) -> list[str]:
        if self.opcode in ("async-update", "async-done"):
            return []  # what async-start called
        names = re.findall(r"\b(?:calls|to_apply|body|condition)=%?([\w.-]+)", self.text)
        for group in re.findall(
            r"\b(?:branch_computations|called_computations)=\{(.*?)\}", self.text
        ):
            names += re.findall(r"%?([\w.-]+)", group)
        return names

    def attribute(self, name: str) -> str | None:
        found = re.search(rf"\b{name}=%?([\w.-]+)", self.text)
        return found and found.group(1)


_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.+?) ([a-z][a-z-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")


def _computations(text: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
    """The instructions of every computation by name, and the name of the entry."""
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header.group(2), {})
            entry = header.group(2) if header.group(1) else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            name, shape, opcode, rest = match.groups()
            shapes = tuple(re.findall(r"\b[a-z]\w*\[[\d,]*\]", shape))
            operands = tuple(re.findall(r"%([\w.-]+)", rest.split(")", 1)[0]))
            current[name] = _Instruction(opcode, shapes, operands, line)
            if line.lstrip().startswith("ROOT"):
                current["ROOT"] = current.pop(name)
    return computations, entry


def _times(computations, entry: str) -> dict[str, int]:
    """How often each computation runs."""

    @functools.cache
    def times(name):
        if name == entry:
            return 1
        return sum(times(caller) * trips for caller, trips in callers[name])

    callers = collections.defaultdict(list)
    for name, instructions in computations.items():
        for instruction in instructions.values():
            trips = 1
            if instruction.opcode == "while":
                trips = _trips(instruction, instructions, computations)
            for called in instruction.called():
                callers[called].append((name, trips))
    return {name: times(name) for name in computations}


def _trips(loop: _Instruction, around, computations) -> int:
    """The length of a loop that counts up to a constant; 1 for any other."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text):
        return int(known.group(1))
    condition = computations[loop.attribute("condition")]
    body = computations[loop.attribute("body")]
    compare = condition.get("ROOT")
    if compare is None or compare.opcode != "compare" or "direction=LT" not in compare.text:
        return 1
    counter, limit = (condition.get(name) for name in compare.operands)
    limit = _constant(limit)
    if limit is None or counter is None or counter.opcode != "get-tuple-element":
        return 1
    index = int(counter.attribute("index"))
    step, begin = 1, 0
    updated = body.get(body["ROOT"].operands[index])
    if updated is not None and updated.opcode == "add":
        step = next((c for o in updated.operands if (c := _constant(body.get(o)))), 1)
    first = around.get(loop.operands[0])
    if first is not None and first.opcode == "tuple":
        begin = _constant(around.get(first.operands[index])) or 0
    return max(0, -(-(limit - begin) // step))


def _constant(instruction: _Instruction | None) -> int | None:
    found = instruction and re.search(r" constant\((-?\d+)\)", instruction.text)
    return int(found.group(1)) if found else None


def _nbytes(shape: str) -> int:
    dtype, sizes = re.fullmatch(r"(\w+)\[([\d,]*)\]", shape).groups()
    return BYTES.get(dtype, 1) * math.prod(int(size) for size in sizes.split(",") if size)


def _group(text: str, mesh: jax.sharding.Mesh) -> np.ndarray:
    """The positions in the flattened mesh of some devices that exchange with one another.

    They are written as a list, as a reshaped and transposed range, as axes of a mesh, or as the
    pairs of a permutation, of which any one tells the direction.
    """
    if "source_target_pairs=" in text:
        pairs = re.findall(r"\{(\d+),(\d+)\}", text.partition("source_target_pairs=")[2])
        return np.array(next(pair for pair in pairs if pair[0] != pair[1]), int)
    numbers = lambda group: [int(number) for number in group.split(",")]
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return np.array(numbers(found.group(1)))
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, source, order = found.groups()
        devices = np.arange(mesh.size).reshape(numbers(source))
        return devices.transpose(order and numbers(order)).reshape(numbers(shape))[0]
    if found := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found.group(1)))
        devices = np.arange(mesh.size).reshape([int(size) for size in sizes.values()])
        chosen = re.findall(r"'(\w+)'", found.group(2))
        return devices[tuple(slice(None) if name in chosen else 0 for name in sizes)].ravel()
    return np.arange(mesh.size)


def _axes(group: np.ndarray, mesh: jax.sharding.Mesh) -> tuple[str, ...]:
    """The axes of the mesh along which a group extends."""
    positions = np.unravel_index(group, mesh.devices.shape)
    return tuple(
        axis
        for axis, position in zip(mesh.axis_names, positions, strict=True)
        if len(set(position.tolist())) > 1
    )
