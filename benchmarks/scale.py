"""Compiles the training steps of Wan 2.1 1.3B for TPU slices and records what they take.

python benchmarks/scale.py            # what is missing in results/scale.json, then docs/scale.md
python benchmarks/scale.py --table    # only the table

Every row is one `cfpp.aot`; it takes a minute or several on one core, and is kept when it is done.
"""

import argparse
import dataclasses
import datetime
import importlib
import json
import pathlib

from cfpp import aot

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/scale.json"
PAGE = ROOT / "docs/scale.md"
BEGIN, END = "<!-- table of benchmarks/scale.py -->\n", "<!-- end of table -->\n"

STAGES = {
    "1": ("stage1", "wan_1_3b"),
    "2": ("stage2", "wan_1_3b"),
    "3": ("stage3", "wan_1_3b"),
    "3, 14B real score": ("stage3", "wan_1_3b,teacher=14b"),
}

# Clips in a batch and mesh. Slices smaller than the four show where a stage stops to fit.
SLICES = {
    "v5e:16x16": (64, "fsdp=64,context=4"),
    "v5p:4x4x4": (64, "fsdp=16,context=4"),
    "v6e:16x16": (64, "fsdp=64,context=4"),
    "v5p:8x8x8": (128, "fsdp=128,context=4"),
    "v5p:2x2x2": (8, "fsdp=8"),
    "v5p:2x2x1": (4, "fsdp=4"),
    "v6e:4x4": (8, "fsdp=8,context=2"),
    "v5e:4x4": (4, "fsdp=4,context=4"),
    "v5e:8x8": (16, "fsdp=16,context=4"),
}


def compile_row(stage: str, topology: str) -> dict:
    """Compiles one row."""
    module, argument = STAGES[stage]
    batch, sizes = SLICES[topology]
    config = importlib.import_module(f"configs.{module}").get_config(argument)
    config.batch_size = batch
    config.mesh.update(aot.mesh_sizes(sizes))
    report = dataclasses.asdict(aot.compile_step(config, topology))
    return {
        "stage": stage,
        "topology": topology,
        "batch": batch,
        "date": datetime.date.today().isoformat(),
        **report,
    }


def table(rows: list[dict]) -> str:
    """The table of the page."""
    lines = [
        "| stage | slice | clips | mesh | arguments, GiB | temporaries, GiB | peak, of HBM | "
        "TFLOP | GiB received | s at least | compiled in, s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    order = {(s, t): i for i, (s, t) in enumerate((s, t) for s in STAGES for t in SLICES)}
    for row in sorted(rows, key=lambda row: order[row["stage"], row["topology"]]):
        sizes = ", ".join(f"{axis} {size}" for axis, size in row["mesh"].items() if size > 1)
        peak = f"{row['peak'] / row['memory']:.0%}"
        cells = [row["stage"], row["topology"], row["batch"], sizes]
        if row["fits"]:
            received = sum(c["received"] * c["times"] for c in row["collectives"])
            seconds = max(row["compute_seconds"], row["communication_seconds"])
            cells += [f"{row[name] / 2**30:.2f}" for name in ("arguments", "temporaries")]
            cells += [peak, f"{row['flops'] / 1e12:.0f}", f"{received / 2**30:.1f}"]
            cells += [f"{seconds:.1f}"]
        else:
            cells += ["", "", f"{peak}, does not fit", f"{row['flops'] / 1e12:.0f}", "", ""]
        lines.append("| " + " | ".join(map(str, [*cells, f"{row['compile_seconds']:.0f}"])) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Reads the command line, compiles what is missing and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true", help="compile nothing")
    options = parser.parse_args()
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for topology in SLICES if not options.table else ():
        for stage in STAGES:
            if any((row["stage"], row["topology"]) == (stage, topology) for row in rows):
                continue
            rows.append(compile_row(stage, topology))
            RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
            print(table(rows[-1:]), flush=True)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + table(rows) + END + after)


if __name__ == "__main__":
    main()
