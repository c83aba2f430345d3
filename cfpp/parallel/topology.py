"""TPU slices that are not at hand: their devices for the compiler, and their nominal figures."""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from cfpp.errors import UserError, first_line, how_to_install

GIB = 2**30


class Chip(NamedTuple):
    """A device's figures, from Google's TPU documentation; the memory as the compiler limits it.

    A device is a chip, but half of one of the seventh generation, whose chips are of two.

    Attributes:
      memory: bytes of HBM that a program may use.
      rate: bfloat16 operations a second.
      links: bytes a second over all of its links to other chips.
      largest: the largest slice.
    """

    memory: float
    rate: float
    links: float
    largest: str


CHIPS = {
    "v5e": Chip(15.75 * GIB, 197e12, 200e9, "16x16"),
    "v5p": Chip(95.74 * GIB, 459e12, 600e9, "16x16x24"),
    "v6e": Chip(31.25 * GIB, 918e12, 448e9, "16x16"),
    "tpu7x": Chip(94.75 * GIB, 2307e12 / 2, 600e9 / 2, "16x24x24"),
}

# Slices by their number of axes; of those with three axes there are more, see `_is_slice`. The
# compiler would take others too, which nobody can rent.
SLICES = {
    2: ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: ("2x2x1", "2x2x2", "2x2x4", "2x4x4"),
}


def prepare_environment() -> None:
    """Lets the TPU compiler run beside other programs on a machine without TPUs.

    Call it before JAX is imported.
    """
    for name, value in {
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # or else two compilations at once refuse
        "TPU_SKIP_MDS_QUERY": "1",  # no metadata server
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5p-8",  # asked for, and without meaning here
        "TPU_MIN_LOG_LEVEL": "4",
        "TPU_STDERR_LOG_LEVEL": "4",
    }.items():
        os.environ.setdefault(name, value)


def chip(topology: str) -> Chip:
    """The chip of a topology such as 'v5p:4x4x4'.

    Raises:
      UserError: it is none of `CHIPS`, or there is no such slice of it.
    """
    name, _, shape = topology.partition(":")
    if name not in CHIPS:
        raise UserError(
            f"--topology={topology}: unknown; give a chip, one of {', '.join(CHIPS)}, and a shape, "
            "as v5p:4x4x4 or v5e:16x16"
        )
    found = CHIPS[name]
    if not _is_slice(shape, found.largest):
        axes = found.largest.count("x") + 1
        more = f", and three multiples of 4, small ones first, up to {found.largest}"
        raise UserError(
            f"--topology={topology}: unknown; slices of {name} are {', '.join(SLICES[axes])}"
            + (more if axes == 3 else "")
        )
    return found


def _is_slice(shape: str, largest: str) -> bool:
    sizes = lambda text: [int(size) for size in text.split("x")]
    axes = largest.count("x") + 1
    if shape in SLICES[axes]:
        return True
    if axes == 2 or not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", shape):
        return False
    found = sizes(shape)
    whole = found == sorted(found) and not any(size % 4 for size in found)
    return whole and math.prod(found) <= math.prod(sizes(largest))


def devices(topology: str) -> Sequence[Any]:
    """The devices of a topology such as 'v5p:4x4x4', for the compiler alone.

    Raises:
      UserError: there is no such topology, or no compiler for it.
    """
    chip(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"the TPU compiler is missing; {how_to_install('tpu')}")
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except JaxRuntimeError as error:
        raise UserError(f"--topology={topology}: {first_line(error)}") from error
