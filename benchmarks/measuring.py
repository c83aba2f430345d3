"""What the benchmarks share: the machine's description, its measured rates, and timing."""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cfpp.errors import UserError

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too

RESULTS = pathlib.Path(__file__).parent / "results"
sys.path.append(str(RESULTS.parents[1]))  # where `configs` is


def machine() -> dict:
    """Date, device and versions, as they stand in every result."""
    versions = {}
    for package in ("jax", "jaxlib", "flax", "tokamax", "torch"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "versions": versions,
    }


def times(function: Callable, *arguments, budget: float = 3.0) -> list[float]:
    """Seconds of calls whose result is awaited, after one that compiles.

    Args:
      budget: seconds to go on for, after the first three calls.
    """
    jax.block_until_ready(function(*arguments))
    measured, begin = [], time.perf_counter()
    while len(measured) < 3 or (len(measured) < 50 and time.perf_counter() - begin < budget):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        measured.append(time.perf_counter() - start)
    return measured


def seconds(function: Callable, *arguments, budget: float = 3.0) -> float:
    """The median of `times`."""
    return statistics.median(times(function, *arguments, budget=budget))


def matmul_rate(dtype) -> float:
    """Operations a second of a large square matrix product at its fastest: what to hope for."""
    size = 8192 if jax.default_backend() != "cpu" else 2048
    x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    return 2 * size**3 / min(times(jax.jit(jnp.dot), x, x))


def bandwidth() -> float:
    """Bytes a second of a copy at its fastest, read and written."""
    x = jnp.ones(2**28 if jax.default_backend() != "cpu" else 2**26, jnp.float32)
    return 2 * x.nbytes / min(times(jax.jit(lambda x: x + 1), x))


def peak_gib() -> float:
    """The most memory in use so far: on the device, or of the process where that is the CPU."""
    statistics_of_device = jax.devices()[0].memory_stats()
    if statistics_of_device:
        return statistics_of_device["peak_bytes_in_use"] / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def rounded(values: Any) -> Any:
    """The same with all numbers to four significant digits."""
    return jax.tree.map(lambda x: float(f"{x:.4g}") if isinstance(x, float) else x, values)


def write_table(page: pathlib.Path, name: str, text: str) -> None:
    """Puts a table between its markers in a page, `<!-- NAME -->` and `<!-- end of NAME -->`."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    before, _, rest = page.read_text().partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(before + begin + text + end + after)


def named_workdirs(description: str, what: str) -> dict[str, str]:
    """Work directories by name, from a command line of `NAME=WORKDIR`.

    Args:
      description: of the program.
      what: the work directories are of, such as 'stage-1 runs'.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdirs", nargs="+", metavar="NAME=WORKDIR", help=what)
    words = parser.parse_args().workdirs
    return {name: workdir for name, _, workdir in (word.partition("=") for word in words)}


def check_public_code(checkout: pathlib.Path) -> None:
    """Raises UserError where `checkout` is no clone of the public PyTorch code."""
    if not checkout.joinpath("wan", "modules", "causal_model.py").is_file():
        raise UserError(
            f"{checkout} is no clone of Causal-Forcing: it has no "
            "wan/modules/causal_model.py; git clone https://github.com/thu-ml/Causal-Forcing"
        )


def read(name: str) -> dict:
    """What `write` has written by this name; empty where there is no file."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write(name: str, results: dict) -> None:
    """Writes `benchmarks/results/NAME.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(rounded(results), indent=1) + "\n")
    print(f"wrote {path}")
