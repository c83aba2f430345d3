"""Kills a run of several processes again and again and compares it with one that was left alone.

python benchmarks/survive.py            # 10 SIGKILLs and 3 SIGTERMs for each of two runs
python benchmarks/survive.py --kills=3 --terminations=1 --out=FILE

What runs is `cfpp.main` with a tiny stage 1, on 4 virtual devices. A random process is hit at a
random moment, half of the times while a checkpoint is being written, and all processes are started
again: in one run always two processes on the same mesh, in the other on another mesh, by one, two
or four processes. Writes `benchmarks/results/survive.json` and the table in `docs/launch.md`.
"""

import argparse
import datetime
import json
import pathlib
import random
import resource
import shutil
import signal
import sys
import tempfile
import time

import jax
import measuring
import numpy as np
import orbax.checkpoint as ocp

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from cfpp.train import items
from tests.parallel import several
from tests.train import crash

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/survive.json"
PAGE = ROOT / "docs/launch.md"

COMPARED = (items.MODEL, items.STATE, "losses")

SAVE_EVERY = 2
STEPS_A_HIT = 7  # of the run, that it lasts long enough

JOIN_TIMEOUT = 30.0  # seconds that the others wait for one that was killed before it came

SMALL = {
    "batch_size": 8, "save_every": SAVE_EVERY, "log_every": 1, "keep": 2,
    "data.episodes": 8, "data.frames": 4, "data.episode_frames": 8,
    "model.dim": 32, "model.ffn_dim": 64, "model.layers": 2, "model.frequency_dim": 16,
    "optimizer.name": "adamw", "optimizer.learning_rate": 1e-3,
}  # fmt: skip

# Processes, and the mesh of their 4 devices.
SAME = (2, {"data": 2, "fsdp": 2})
OTHERS = (
    SAME,
    (1, {"data": 1, "fsdp": 4}),
    (2, {"data": 1, "context": 2, "tensor": 2}),
    (4, {"data": 1, "fsdp": 2, "tensor": 2}),
    (1, {"data": 2, "context": 2}),
)


def start(workdir: pathlib.Path, layout: tuple[int, dict[str, int]], steps: int) -> several.Job:
    """Starts the processes of a run, or starts them again."""
    count, mesh = layout
    sizes = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1} | mesh
    fields = SMALL | {f"mesh.{axis}": size for axis, size in sizes.items()}
    fields |= {"steps": steps, "data.directory": workdir.parent / "data"}
    arguments = [f"--config={ROOT / 'configs/stage1.py'}:smoke", f"--workdir={workdir}"]
    arguments += [f"--config.{name}={value}" for name, value in fields.items()]
    arguments.append(f"--join_timeout={JOIN_TIMEOUT}")
    return several.Job(workdir, several.command(*arguments), count)


def disturb(workdir: pathlib.Path, layouts, hits: list[int], steps: int, draw: random.Random):
    """Runs until the end, hit by these signals; returns what happened, hit by hit."""
    told = []
    for number in hits:
        layout = draw.choice(layouts)
        job = start(workdir, layout, steps)
        victim = draw.randrange(layout[0])
        before = crash.newest(workdir)
        wanted = before + SAVE_EVERY * draw.randrange(3)  # 0 is while it starts
        crash.wait_until(lambda wanted=wanted: crash.newest(workdir) >= wanted)
        time.sleep(draw.uniform(0, 0.3 if wanted > before else 5.0))
        if wanted > before and draw.random() < 0.5:
            crash.wait_until(lambda: crash.unfinished(workdir))
        # What is unfinished while it starts is of the time before.
        saving = wanted > before and bool(crash.unfinished(workdir))
        job.send(victim, number)
        ended = job.end()
        hit = {
            "signal": signal.Signals(number).name,
            "processes": layout[0],
            "mesh": layout[1],
            "victim": victim,
            "while saving": saving,
            "steps": [before, crash.newest(workdir)],
            "codes": ended["codes"],
        }
        print(hit, flush=True)
        check(hit, ended["told"], steps)
        told.append(hit)
    return told


def check(hit: dict, output: list[str], steps: int) -> None:
    """Checks that the processes ended as they should."""
    codes = list(hit["codes"])
    victim, started = codes.pop(hit["victim"]), hit["steps"][1] > hit["steps"][0]
    if hit["signal"] == "SIGKILL":
        fine = victim == -signal.SIGKILL and 0 not in codes
    elif started:
        fine = victim == 0 and not any(codes)
    else:  # it may come before anyone can agree on anything; then there is nothing to save
        fine = victim in (0, -signal.SIGTERM)
    if not fine or hit["steps"][1] == steps:
        raise AssertionError("\n".join([str(hit), *output]))


def finish(workdir: pathlib.Path, layout, steps: int) -> None:
    """Runs to the end, undisturbed from here on."""
    ended = start(workdir, layout, steps).end()
    assert not any(ended["codes"]), ended["told"]


def final(workdir: pathlib.Path):
    """All arrays of the last checkpoint, parameters first, and the losses by step."""
    step = crash.newest(workdir)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    arrays = {}
    for item in (items.MODEL, items.STATE):
        handler = ocp.StandardCheckpointHandler()
        path = workdir / "checkpoints" / str(step) / item
        template = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
            handler.metadata(path).tree,
        )
        arrays[item] = jax.tree.map(
            np.asarray, handler.restore(path, args=ocp.args.StandardRestore(template))
        )
    return step, arrays, several.losses(workdir)


def difference(a, b) -> float:
    """The largest difference of two arrays in a tree, as a share of the array's largest value.

    It is 0 where all bits are the same.
    """

    def share(x, y):
        if x.tobytes() == y.tobytes():
            return 0.0
        return max(float(np.max(np.abs(x - y)) / np.max(np.abs(y))), sys.float_info.min)

    return max(jax.tree.leaves(jax.tree.map(share, a, b)))


def main() -> None:
    """Runs it all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--terminations", type=int, default=3)
    parser.add_argument("--pace", type=float, default=0.2, help="seconds that steps take longer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    arguments = parser.parse_args()
    begin = time.monotonic()
    steps = STEPS_A_HIT * (arguments.kills + arguments.terminations)
    draw = random.Random(arguments.seed)
    hits = [signal.SIGKILL] * arguments.kills + [signal.SIGTERM] * arguments.terminations
    found = {"date": datetime.date.today().isoformat(), "steps": steps, "runs": {}}
    folder = pathlib.Path(tempfile.mkdtemp())  # it stays if something goes wrong
    jax.config.update("jax_compilation_cache_dir", str(folder / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_disable_most_optimizations", True)  # compiles faster
    undisturbed = folder / "undisturbed"
    several.slow_down(arguments.pace)
    finish(undisturbed, SAME, steps)
    print(f"undisturbed: {time.monotonic() - begin:.1f} s", flush=True)
    runs = {"on the same mesh": (SAME,), "on other meshes": OTHERS}
    for name, layouts in runs.items():
        draw.shuffle(hits)
        workdir = folder / name.replace(" ", "_")
        found["runs"][name] = {"hits": disturb(workdir, layouts, hits, steps, draw)}
        finish(workdir, draw.choice(layouts), steps)
    wanted_step, wanted, losses = final(undisturbed)
    for name in runs:
        step, arrays, its_losses = final(folder / name.replace(" ", "_"))
        assert step == wanted_step == steps and its_losses.keys() == losses.keys()
        found["runs"][name] |= {item: difference(arrays[item], wanted[item]) for item in wanted} | {
            "losses": max(abs(its_losses[i] / losses[i] - 1) for i in losses)
        }
        print(name, {what: found["runs"][name][what] for what in COMPARED}, flush=True)
    shutil.rmtree(folder)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    found["seconds"], found["cpu_seconds"] = time.monotonic() - begin, used.ru_utime + used.ru_stime
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.out == RESULTS:
        write_table(found)


def write_table(found: dict) -> None:
    """Puts the table between its markers in the page."""
    lines = [
        "| started again | SIGKILL | SIGTERM | while saving | while starting | parameters | "
        "whole state | losses |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, run in found["runs"].items():
        hits = run["hits"]
        cells = [
            name,
            sum(hit["signal"] == "SIGKILL" for hit in hits),
            sum(hit["signal"] == "SIGTERM" for hit in hits),
            sum(hit["while saving"] for hit in hits),
            sum(hit["steps"][0] == hit["steps"][1] for hit in hits),
            *(f"{run[what]:.1e}" if run[what] else "the same bits" for what in COMPARED),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    measuring.write_table(PAGE, "survive", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
