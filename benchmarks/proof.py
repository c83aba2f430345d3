"""Regenerates the numbers and figures of `docs/proof.md`: minutes on two cores.

python -m benchmarks.proof                 # or: --only=solvers,consistency,race,collapse,network

Writes `benchmarks/results/proof.json`, `docs/images/proof_*.png` and the tables of the page. What
it computes is what `tests/proof` asserts, at more points.
"""

import argparse
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measuring
from cfpp import flow
from cfpp.data import linear_gaussian
from cfpp.stages import ode
from tests.proof import experiments, networks
from tests.proof.experiments import ACTIONS, FRAMES

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "proof.json"
PAGE = ROOT / "docs" / "proof.md"
IMAGES = ROOT / "docs" / "images"

WORLD = linear_gaussian.example()
GRID = np.asarray(flow.grid(24, 1.0), np.float64)
RATES = (0.001, 0.003, 0.01, 0.03)
TARGET = 0.03  # relative error that the race of CD and ODE is run to
BLUE, ORANGE, GREEN, GREY = "#3b6fd4", "#e07b00", "#1a9850", "#8a8f99"


def solvers() -> dict:
    """The error of whole trajectories by solver, shift and number of steps."""
    x0, condition = experiments.batch(WORLD, jax.random.key(0), 256)
    noise = jax.random.normal(jax.random.key(1), x0.shape)
    teacher = WORLD.teacher_forced(x0, condition)
    exact = WORLD.flow_map(x0, condition)(noise, jnp.ones(noise.shape[:2]))
    counts = [12, 24, 48, 96, 192]
    errors = {}
    for solver in flow.SOLVERS:
        for shift in (1.0, 5.0):
            end = jax.jit(lambda grid, s=solver: ode.trajectory(teacher, noise, grid, s)[-1])
            errors[f"{solver}, shift {shift:g}"] = [
                float(
                    experiments.relative_error(end(jnp.asarray(flow.grid(n, shift), float)), exact)
                )
                for n in counts
            ]
    return {"steps": counts, "errors": errors}


def consistency() -> dict:
    """The error of the consistency map by level, with and without the last pair."""
    grid = np.asarray(flow.grid(16, 1.0), np.float64)
    separate, shared = experiments.separate(WORLD, grid), experiments.shared(WORLD, grid, 8)
    runs = {
        "teacher": (separate, 0.0, 1200),
        "random": (separate, 0.3, 1200),
        "teacher, shared weights": (shared, 0.0, 3000),
    }
    rows = {}
    for name, (student, scale, steps) in runs.items():
        measure = experiments.map_error(student, grid[:-1])
        for pairs, levels in (("all pairs", 16), ("without the last", 15)):
            loss = experiments.consistency_loss(student, grid, "heun", levels, draws=1)
            params = student.init(jax.random.key(1), scale)
            _, errors = experiments.train(
                loss, params, measure, steps=steps, every=steps, size=64, rate=0.03
            )
            rows[f"{name}, {pairs}"] = np.asarray(errors[-1]).tolist()
    return {"sigma": grid[:-1].tolist(), "errors": rows}


def race() -> dict:
    """Teacher steps to a given error, CD against ODE: by rate, and by draws of a clean pass."""
    out = {"rates": list(RATES), "target": TARGET, "steps": {}, "draws": []}
    for levels in (24, 48):
        student = experiments.separate(WORLD, np.asarray(flow.grid(levels, 1.0), np.float64))
        rows = []
        for rate in RATES:
            curves = experiments.race(student, rate, steps=2400)
            rows.append({name: experiments.spent(curve, TARGET) for name, curve in curves.items()})
            if (levels, rate) == (24, 0.003):
                out["curves"] = {
                    name: [np.asarray(part).tolist() for part in curve]
                    for name, curve in curves.items()
                }
        out["steps"][levels] = rows
    student = experiments.separate(WORLD, GRID)
    measure = experiments.map_error(student, GRID[[0, 12]])
    for clips, draws in ((64, 1), (32, 2), (16, 4), (8, 8), (64, 4)):
        loss = experiments.consistency_loss(student, GRID, "heun", 24, draws)
        _, errors = experiments.train(
            loss, student.init(jax.random.key(0)), measure,
            steps=1600, every=20, size=clips, rate=0.003, final=1.0,
        )  # fmt: skip
        spent = experiments.spent((20 * np.arange(len(errors)), errors.max(1)), TARGET)
        passes = None if spent is None else spent * clips * (1 + draws)
        out["draws"].append(
            {"clips": clips, "draws": draws, "updates": spent, "clip_passes": passes}
        )
    return out


def collapse() -> dict:
    """What regression onto the bidirectional teacher loses, by closed form."""
    law, size = WORLD.law(ACTIONS), WORLD.size
    sigmas = np.linspace(0.02, 1, 50)
    lost = [
        [
            float(
                jnp.trace(linear_gaussian.regression(law, sigma, i, size)[1])
                / jnp.trace(WORLD.conditional(i, 0).covariance)
            )
            for sigma in sigmas
        ]
        for i in range(FRAMES)
    ]
    rolled = {}
    variance = lambda law: np.diag(law.covariance).reshape(FRAMES, size).sum(1)
    for steps in (1, 2, 4):
        levels = 1 - np.arange(steps) / steps
        maps = [
            [linear_gaussian.regression(law, s, i, size)[0] for s in levels] for i in range(FRAMES)
        ]
        got = linear_gaussian.rollout(maps, levels)
        rolled[steps] = {
            "variance": (variance(got) / variance(law)).tolist(),
            "divergence": float(got.divergence(law)),
        }
    return {"sigma": sigmas.tolist(), "lost": lost, "rollout": rolled}


def network() -> dict:
    """The DiT through stages 1, 2 and 3: how far each frame's mean and covariance are off."""
    world = linear_gaussian.example(pixels=1)
    true = jax.tree.map(np.asarray, world.law(ACTIONS))
    euler = jax.tree.map(np.asarray, networks.solved(world, ACTIONS, flow.grid(48, 1.0)))
    with jax.enable_x64(False):
        clips = networks.recipe(world, ACTIONS)
    rows = {}
    for name, x in clips.items():
        off = networks.deviations(x, euler if name.startswith("teacher") else true)
        rows[name] = {key: value.tolist() for key, value in off.items()}
    return rows


def figure(panels: int, width: float):
    """Axes side by side, in the style of the evaluation's reports."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    out = Figure(figsize=(width, 3.4), dpi=90, layout="constrained")
    FigureCanvasAgg(out)
    axes = out.subplots(1, panels, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e6e8ec", linewidth=0.8)
        axis.set_axisbelow(True)
    return out, axes


def draw_consistency(results: dict) -> None:
    """Error against sigma, solver orders beside it."""
    out, (left, right) = figure(2, 9.5)
    found = results["consistency"]
    style = {
        "teacher, all pairs": (BLUE, "-", "from the teacher"),
        "random, all pairs": (GREEN, "-", "from random weights"),
        "teacher, without the last": (BLUE, ":", "from the teacher, last pair never drawn"),
        "random, without the last": (ORANGE, ":", "from random weights, last pair never drawn"),
    }
    for name, (color, dashes, label) in style.items():
        left.plot(found["sigma"], found["errors"][name], color=color, ls=dashes, lw=2, label=label)
    left.axhline(0.01, color=GREY, lw=1)
    left.set(yscale="log", xlabel="sigma", ylim=(1e-4, 0.2))
    left.set_title("Error of the map after causal CD", loc="left", fontsize=10, fontweight="bold")
    left.legend(frameon=False, fontsize=8)
    found = results["solvers"]
    for name, errors in found["errors"].items():
        solver, _, shift = name.partition(", shift ")
        color = BLUE if solver == "euler" else ORANGE
        right.loglog(
            found["steps"], errors, "o-" if shift == "1" else "o:", color=color, ms=4, label=name
        )
    right.set(xlabel="solver steps N", xticks=found["steps"], xticklabels=found["steps"])
    right.minorticks_off()
    right.set_title("Error of the solver's path", loc="left", fontsize=10, fontweight="bold")
    right.legend(frameon=False, fontsize=8)
    out.savefig(IMAGES / "proof_consistency.png")


def draw_race(results: dict) -> None:
    """CD against ODE by teacher steps: one run, its ratio by error, and the steps by rate."""
    out, (left, middle, right) = figure(3, 10.5)
    found = results["race"]
    curves = {name: np.array(curve) for name, curve in found["curves"].items()}
    labels = {"cd": (BLUE, "causal CD"), "ode": (ORANGE, "causal ODE")}
    for name, (color, label) in labels.items():
        spent, errors = curves[name]
        left.loglog(spent[1:], errors[1:], color=color, lw=2, label=label)
        for (levels, rows), dashes in zip(found["steps"].items(), ("o-", "o:"), strict=True):
            steps = [row[name] or np.nan for row in rows]
            right.loglog(
                found["rates"], steps, dashes, color=color, lw=2, label=f"{label}, N = {levels}"
            )
    left.axhline(found["target"], color=GREY, lw=1)
    left.set(xlabel="teacher steps (batches of 64 clips)")
    left.set_title("Error of the map, rate 0.003", loc="left", fontsize=10, fontweight="bold")
    left.legend(frameon=False, fontsize=9)
    targets = np.geomspace(0.01, 0.5, 50)
    spent = {
        name: [experiments.spent(c, target) for target in targets] for name, c in curves.items()
    }
    middle.semilogx(targets, np.divide(spent["ode"], spent["cd"]), color=GREEN, lw=2)
    middle.axhline(4, color=GREY, lw=1)
    middle.invert_xaxis()
    middle.set(xlabel="error reached", ylim=(0, None))
    middle.set_title("Teacher steps, ODE by CD", loc="left", fontsize=10, fontweight="bold")
    right.set(xlabel="learning rate")
    right.set_title("Teacher steps to 3 %", loc="left", fontsize=10, fontweight="bold")
    right.legend(frameon=False, fontsize=8)
    out.savefig(IMAGES / "proof_race.png")


def draw_collapse(results: dict) -> None:
    """Variance lost by regression onto the bidirectional teacher."""
    out, (left, right) = figure(2, 9.5)
    found = results["collapse"]
    colors = (BLUE, GREEN, ORANGE, GREY)
    for i, (lost, color) in enumerate(zip(found["lost"], colors, strict=True)):
        left.plot(found["sigma"], np.multiply(100, lost), color=color, lw=2, label=f"frame {i + 1}")
    left.set(xlabel="sigma", ylim=(-1, None))
    left.set_title("Variance lost in training (%)", loc="left", fontsize=10, fontweight="bold")
    left.legend(frameon=False, fontsize=9)
    right.axhline(100, color=GREY, lw=1)
    frames = np.arange(1, FRAMES + 1)
    for (steps, row), color in zip(found["rollout"].items(), colors, strict=False):
        right.plot(
            frames, np.multiply(100, row["variance"]), "o-", color=color, lw=2,
            label=f"{steps} step" + "s" * (int(steps) > 1),
        )  # fmt: skip
    right.set(xlabel="frame", xticks=frames, ylim=(0, 105))
    right.set_title("Variance left in a rollout (%)", loc="left", fontsize=10, fontweight="bold")
    right.legend(frameon=False, fontsize=9)
    out.savefig(IMAGES / "proof_collapse.png")


def percent(value: float) -> str:
    """A share in percent, to what is worth reading of it."""
    value *= 100
    digits = ".0f" if value >= 10 else ".1f" if value >= 0.1 else ".1g"
    return f"{value:{digits}} %"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is words and whose others are numbers."""
    line = lambda cells: "|".join(["", *(f" {cell} " if cell else " " for cell in cells), "\n"])
    return line(head) + "|---" + "|---:" * (len(head) - 1) + "|\n" + "".join(map(line, rows))


def solvers_table(found: dict) -> str:
    """Errors by solver and number of steps."""
    steps = [f"N = {found['steps'][0]}", *map(str, found["steps"][1:])]
    rows = [[name.capitalize(), *map(percent, row)] for name, row in found["errors"].items()]
    return table(["", *steps], rows)


def consistency_table(found: dict) -> str:
    """Errors of the map at the best and at the worst of all levels."""
    names = {
        "teacher": "from the teacher",
        "random": "from random weights",
        "teacher, shared weights": "from the teacher, weights shared between levels",
    }
    spread = lambda errors: f"{100 * min(errors):.2f} - {100 * max(errors):.2f} %"
    pairs = ("all pairs", "without the last")
    rows = [
        [text, *(spread(found["errors"][f"{name}, {kind}"]) for kind in pairs)]
        for name, text in names.items()
    ]
    return table(["student", *pairs], rows)


def race_table(found: dict) -> str:
    """Teacher steps to the target by learning rate, and their ratio."""
    rows = []
    for levels, each in found["steps"].items():
        for name in ("cd", "ode"):
            spent = ["not in 2,400" if row[name] is None else f"{row[name]:,}" for row in each]
            rows.append([f"{name.upper()}, N = {levels}", *spent])
        both = ((row["ode"], row["cd"]) for row in each)
        rows.append(["ratio", *(f"{ode / cd:.3g}" if ode and cd else "" for ode, cd in both)])
    return table(["rate", *map(str, found["rates"])], rows)


def draws_table(found: dict) -> str:
    """What several draws of a clean pass cost."""
    rows = []
    for row in found["draws"]:
        more = " (four times the draws)" if row["clips"] * row["draws"] > 64 else ""
        name = f"{row['clips']} x {row['draws']}{more}"
        rows.append([name, str(row["updates"]), f"{row['clip_passes']:,}"])
    head = ["clips x draws", "updates to 3 %", "clips passed through a network, clean + noisy"]
    return table(head, rows)


def collapse_table(found: dict) -> str:
    """How much of each frame's variance regression onto the bidirectional teacher loses."""
    frames = [f"frame {i}" for i in range(1, FRAMES + 1)]
    shares = lambda values: [f"{100 * value:.0f} %" for value in values]
    lost = [each[-1] for each in found["lost"]]
    rows = [["lost in training, from pure noise", *shares(lost), ""]]
    for steps, row in found["rollout"].items():
        name = f"left by a rollout, {steps} step{'s' * (steps != '1')}"
        rows.append([name, *shares(row["variance"]), f"{row['divergence']:.2f}"])
    return table(["variance", *frames, "KL(rollout \\|\\| truth), nats"], rows)


def network_table(found: dict) -> str:
    """How far the worst frame of each model is off."""
    rows = []
    for name, off in found.items():
        text = {"teacher, 48 steps": "AR teacher, 48 Euler steps"}.get(name, f"after {name}")
        text = text.replace("after CD", "after causal CD")
        rows.append([text, f"{max(off['mean']):.2f}", f"{100 * max(off['covariance']):.1f} %"])
    return table(["", "mean", "covariance"], rows)


def tables(results: dict) -> dict[str, str]:
    """The tables of the page, by the names of their markers."""
    return {
        "solvers": solvers_table(results["solvers"]),
        "consistency": consistency_table(results["consistency"]),
        "race": race_table(results["race"]),
        "draws": draws_table(results["race"]),
        "collapse": collapse_table(results["collapse"]),
        "network": network_table(results["network"]),
    }


PARTS = {part.__name__: part for part in (solvers, consistency, race, collapse, network)}


def main() -> None:
    """Reads the command line, writes the results and draws them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(PARTS), help="parts to compute anew")
    names = parser.parse_args().only.split(",")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in names:
        begin = time.perf_counter()
        with jax.enable_x64(True):
            # Through JSON, so that what is drawn is what is kept.
            results[name] = json.loads(json.dumps(PARTS[name]()))
        print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    for draw in (draw_consistency, draw_race, draw_collapse):
        draw(results)
    for name, text in tables(results).items():
        measuring.write_table(PAGE, name, text)


if __name__ == "__main__":
    main()
