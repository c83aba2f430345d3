"""TPU slices that are not at hand: their devices for the compiler, and their nominal figures."""

import importlib.util
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from cfpp.errors import UserError

GIB = 2**30


class Chip(NamedTuple):
    """A device's figures, from Google's TPU documentation; the memory as the compiler limits it.

    A device is a chip, but half of one of the seventh generation, whose chips are of two.

    Attributes:
      memory: bytes of HBM that a program may use.
      rate: bfloat16 operations a second.
      links: bytes a second over all of its links to other chips.
      example: a topology.
    """

    memory: float
    rate: float
    links: float
    example: str


CHIPS = {
    "v5e": Chip(15.75 * GIB, 197e12, 200e9, "v5e:16x16"),
    "v5p": Chip(95.74 * GIB, 459e12, 600e9, "v5p:4x4x4"),
    "v6e": Chip(31.25 * GIB, 918e12, 448e9, "v6e:16x16"),
    "tpu7x": Chip(94.75 * GIB, 2307e12 / 2, 600e9 / 2, "tpu7x:4x4x4"),
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
      UserError: it is none of `CHIPS`.
    """
    name, _, shape = topology.partition(":")
    if name not in CHIPS or not shape:
        examples = ", ".join(known.example for known in CHIPS.values())
        raise UserError(f"--topology={topology}: unknown; give a chip and a shape, as {examples}")
    return CHIPS[name]


def devices(topology: str) -> Sequence[Any]:
    """The devices of a topology such as 'v5p:4x4x4', for the compiler alone.

    Raises:
      UserError: there is no such topology, or no compiler for it.
    """
    chip(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("the TPU compiler is missing; pip install 'cfpp[tpu]'")
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except JaxRuntimeError as error:
        raise UserError(f"--topology={topology}: {str(error).splitlines()[0]}") from error
