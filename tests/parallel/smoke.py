"""Runs the stages of the smoke quickstart on one device and on eight; writes their losses.

python -m tests.parallel.smoke FOLDER
"""

import json
import math
import pathlib
import sys
from unittest import mock

import jax

from tests.parallel import several

ROOT = pathlib.Path(__file__).parent.parent.parent
STAGES = ("stage0", "stage1", "stage2", "stage3")

# Processes, and the mesh of all their devices.
LAYOUTS = {
    "one device": (1, {"data": 1}),
    "two processes of four devices": (2, {"data": 2, "fsdp": 2, "context": 2}),
}


def run(folder: pathlib.Path, name: str) -> dict:
    count, mesh = LAYOUTS[name]
    workdir = folder / name.replace(" ", "_")
    fields = {f"mesh.{axis}": size for axis, size in mesh.items()}
    fields |= {"data.directory": folder / "data", "stage1.sample_every": 3}
    fields |= {f"{stage}.log_every": 1 for stage in STAGES}
    job = several.Job(
        workdir,
        several.command(
            f"--config={ROOT / 'configs/quickstart.py'}:smoke",
            f"--workdir={workdir}",
            *(f"--config.{field}={value}" for field, value in fields.items()),
        ),
        count,
        devices=math.prod(mesh.values()),
    )
    ended = job.end()
    assert not any(ended["codes"]), ended["told"]
    return {stage: several.losses(workdir / stage) for stage in STAGES}


def main(folder: pathlib.Path) -> None:
    mock.patch("cfpp.evaluate.run").start()
    jax.config.update("jax_compilation_cache_dir", str(folder / "cache"))
    found = {name: run(folder, name) for name in LAYOUTS}
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    jax.config.update("jax_disable_most_optimizations", True)  # compiles faster
    main(pathlib.Path(sys.argv[1]))
