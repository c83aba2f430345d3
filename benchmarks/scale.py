"""Compiles the training steps of Wan 2.1 1.3B for TPU slices and records what they take.

python benchmarks/scale.py            # what is missing in results/scale.json, then docs/scale.md
python benchmarks/scale.py --slices v5e:2x2 v6e:2x2 --stages 1 2    # only these
python benchmarks/scale.py --table    # only the tables
python benchmarks/scale.py --replay   # only stage 3's gradient, replayed and unrolled

Every row is one `cfpp.aot`; it takes a minute or several on one core, and is kept when it is done,
as long as its mesh and the options that training gives the compiler are the same.
"""

import argparse
import dataclasses
import datetime
import importlib
import json
import pathlib
import sys

from cfpp import aot  # sets the environment of the TPU compiler, so before JAX

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import measuring

from cfpp.attention.pattern import Pattern
from cfpp.parallel import mesh
from cfpp.parallel import topology as slices
from cfpp.rollout.generate import Rollout
from cfpp.rollout.sampler import consistency
from cfpp.stages import dmd
from cfpp.train import program
from tests import tiny

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/scale.json"
PAGE = ROOT / "docs/scale.md"
REPLAY = ROOT / "benchmarks/results/scale_replay.json"

FRAMES = 21  # of a clip

STAGES = {
    "1": ("stage1", "wan_1_3b"),
    "2": ("stage2", "wan_1_3b"),
    "3": ("stage3", "wan_1_3b"),
    "3, 14B real score": ("stage3", "wan_1_3b,teacher=14b"),
}

# Clips in a batch and mesh. The four that all stages shall fit on come first; the smaller ones show
# where a stage stops to fit. On v5p and v6e the compiler gathers parameters of more than 32 parts
# by all-reduce, which takes twice the bytes: there a larger slice is divided by `data` too.
SLICES = {
    "v5e:16x16": (64, "fsdp=64,context=4"),
    "v5p:4x4x4": (64, "data=2,fsdp=8,context=4"),
    "v6e:16x16": (64, "data=8,fsdp=8,context=4"),
    "v5p:8x8x8": (128, "data=16,fsdp=8,context=4"),
    "v5p:2x2x2": (8, "fsdp=8"),
    "v5p:2x2x1": (4, "fsdp=4"),
    "v6e:4x4": (8, "fsdp=8,context=2"),
    "v6e:2x4": (2, "fsdp=2,context=4"),
    "v6e:2x2": (1, "context=4"),
    "v5e:4x4": (4, "fsdp=4,context=4"),
    "v5e:2x4": (2, "fsdp=2,context=4"),
    "v5e:2x2": (1, "context=4"),
    "v5e:8x8": (16, "fsdp=16,context=4"),
}


def options_of(topology: str) -> dict:
    """What training on chips of this slice tells the compiler."""
    return program.COMPILER_OPTIONS.get(slices.devices(topology)[0].device_kind, {})


def compile_row(stage: str, topology: str) -> dict:
    """Compiles one row."""
    module, argument = STAGES[stage]
    batch, sizes = SLICES[topology]
    config = importlib.import_module(f"configs.{module}").get_config(argument)
    config.batch_size = batch
    config.mesh.update(mesh.sizes(sizes))
    report = dataclasses.asdict(aot.compile_step(config, topology))
    return {
        "stage": stage,
        "topology": topology,
        "batch": batch,
        "date": datetime.date.today().isoformat(),
        "options": options_of(topology),
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


def by_hand(row: dict) -> tuple[float, float]:
    """Bytes that a device receives for one layer of stage 1: of tokens, and of parameters.

    Twelve all-to-alls of the tokens: q, k, v and the output of attention, forward, once more for
    the backward pass, and backward. A block's matrices are gathered twice and their gradients
    reduced once; those of the text's keys and values, which no pass computes anew, gathered once.
    Replicas then sum their parts of the gradients, which counts twice. All in bfloat16.
    """
    model = importlib.import_module("configs.stage1").get_config("wan_1_3b").model
    data, fsdp, context = (row["mesh"][axis] for axis in ("data", "fsdp", "context"))
    ways, clips = fsdp * context, row["batch"] / (data * fsdp)
    tokens = (model.height // model.patch) * (model.width // model.patch) / context
    part = 2 * clips * 2 * FRAMES * tokens * model.dim
    block = 6 * model.dim**2 + 2 * model.dim * model.ffn_dim
    text = 2 * model.dim**2
    matrices = 2 * (3 * block + 2 * text)
    gradients = 2 * (block + text) / ways
    replicas = 2 * gradients * (data - 1) / data
    return 12 * part * (context - 1) / context, matrices * (ways - 1) / ways + replicas


def exchange_table(rows: list[dict]) -> str:
    """What is exchanged for a layer of stage 1, by hand and as compiled."""
    lines = [
        "| slice | tokens, MiB | parameters, MiB | by hand | compiled | ratio | options |",
        "|---|---|---|---|---|---|---|",
    ]
    layers = importlib.import_module("configs.stage1").get_config("wan_1_3b").model.layers
    rows = [row for row in rows if row["stage"] == "1" and row["fits"]]
    for row in sorted(rows, key=lambda row: list(SLICES).index(row["topology"])):
        tokens, parameters = (nbytes / 2**20 for nbytes in by_hand(row))
        found = sum(c["received"] * c["times"] for c in row["collectives"]) / layers / 2**20
        cells = [f"{number:.0f}" for number in (tokens, parameters, tokens + parameters, found)]
        cells += [f"{found / (tokens + parameters):.2f}", "yes" if row.get("options") else "no"]
        lines.append("| " + " | ".join([row["topology"], *cells]) + " |")
    return "\n".join(lines) + "\n"


def is_current(row: dict) -> bool:
    """Whether a row has today's mesh, and the options that training gives the compiler."""
    topology = row["topology"]
    sizes = mesh.sizes(SLICES[topology][1])
    return row["mesh"] == sizes and row.get("options", {}) == options_of(topology)


def replay_row(chunk: int) -> dict:
    """Temporaries of stage 3's gradient over 21 frames, generated `chunk` at a time, on the CPU.

    Replayed, and by differentiating the loop that generates: the same gradient. The network is
    small, 4 layers of width 64 with 64 tokens a frame; every chunk is denoised in one step.
    """
    frames = FRAMES
    sizes = dict(height=32, width=32, dim=64, ffn_dim=256, heads=4, layers=4, num_actions=0)
    net = tiny.network(Pattern(chunk=chunk), remat="full", **sizes)
    params, x = tiny.params(net), tiny.latents(net, frames, 1)
    chunks, sigma = frames // chunk, jnp.ones(frames)
    rollout = Rollout(net, consistency(1, 5.0), fused=False)
    noise = lambda frames, step: x[:, frames]
    cache = jax.eval_shape(lambda: net.dit.cache(1, frames))

    def replayed(params, cache):
        cache = cache.replace(frame=jnp.arange(frames))
        return jnp.sum(dmd.replay(net, params, cache, x, sigma, {}) ** 2)

    def unrolled(params):
        def generate(stream, _):
            stream = jax.lax.stop_gradient(stream)
            stream, out = rollout.next_chunk(params, stream, None, noise, jnp.array([1.0, 0.0]), 0)
            return stream, out.x0

        stream = rollout.start(params, x[:, :0], {}, frames)
        return jnp.sum(jax.lax.scan(generate, stream, None, length=chunks)[1] ** 2)

    temporaries = lambda loss, *args: (
        jax.jit(jax.grad(loss)).lower(*args).compile().memory_analysis().temp_size_in_bytes
    )
    return {
        "chunks": chunks,
        "cache": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)),
        "replayed": temporaries(replayed, params, cache),
        "unrolled": temporaries(unrolled, params),
    }


def replay_table(rows: list[dict]) -> str:
    """The table of the page."""
    lines = ["| chunks | replayed, MiB | unrolled, MiB |", "|---|---|---|"]
    for row in rows:
        sizes = (f"{row[name] / 2**20:.1f}" for name in ("replayed", "unrolled"))
        lines.append(f"| {row['chunks']} | " + " | ".join(sizes) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Reads the command line, compiles what is missing and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--slices", nargs="+", choices=SLICES, default=list(SLICES))
    parser.add_argument("--table", action="store_true", help="compile nothing")
    parser.add_argument("--replay", action="store_true", help="compile only stage 3's gradient")
    options = parser.parse_args()
    read = lambda path: json.loads(path.read_text()) if path.exists() else []
    rows, replay_rows = read(RESULTS), read(REPLAY)
    if options.replay or not (replay_rows or options.table):
        replay_rows = [replay_row(chunk) for chunk in (7, 1)]
        REPLAY.write_text(json.dumps(replay_rows, indent=1) + "\n")
    for topology in () if options.table or options.replay else options.slices:
        for stage in options.stages:
            here = [row for row in rows if (row["stage"], row["topology"]) == (stage, topology)]
            if any(map(is_current, here)):
                continue
            new = compile_row(stage, topology)
            rows = [row for row in rows if row not in here] + [new]
            RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
            measuring.write_table(PAGE, "slices", table(rows))
            print(table(rows[-1:]), flush=True)
    measuring.write_table(PAGE, "slices", table(rows))
    measuring.write_table(PAGE, "exchanged", exchange_table(rows))
    measuring.write_table(PAGE, "replay", replay_table(replay_rows))


if __name__ == "__main__":
    main()
