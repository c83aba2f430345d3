"""Plants realistic bugs, one at a time, in a copy of the tree, and records which test notices.

python -m benchmarks.mutations                         # all of them, after the unharmed tree
python -m benchmarks.mutations --only ema_stays        # one

Writes `benchmarks/results/mutations.json` and, from it, `docs/mutations.md`. Tests that should
notice run first, then all others; the first failure ends a run. Exits with 1 if a bug survived.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "mutations.json"
TABLE = ROOT / "docs" / "mutations.md"

FLOW, PATTERN = ("tests/test_flow.py",), ("tests/test_pattern.py",)
SELF, WIRING = "tests/proof/test_self.py::test_", "tests/test_wiring.py::test_"
CACHED = (f"{SELF}cached_equals_teacher_forced",)
REPLAYED = (f"{SELF}replayed_gradient_equals_the_unrolled_one",)
FUSED = (f"{SELF}fused_equals_separate_and_one_scan_equals_chunk_by_chunk",)
DIFFUSERS = ("tests/interop/test_diffusers.py::test_network",)
STAGES = ("tests/test_stages.py::test_consistency_loss_is_its_equation",)
DMD = ("tests/test_stages.py::test_dmd_gradient_points_from_the_student_to_the_data",)
STREAMED = ("tests/test_streaming.py::test_stream_is_the_clip",)


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A bug: `old`, which `file` holds exactly once, becomes `new`; `tests` should notice."""

    name: str
    bug: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def plant(self, text: str) -> str:
        """The text with the bug.

        Raises:
          ValueError: the text does not hold `old` exactly once.
        """
        if text.count(self.old) != 1:
            raise ValueError(
                f"mutation {self.name}: {self.file} holds {text.count(self.old)} times, and not "
                f"once, {self.old!r}"
            )
        return text.replace(self.old, self.new)


MUTATIONS = (
    Mutation(
        "shift_twice", "the timestep shift is applied twice to a schedule", "cfpp/flow.py",
        "np.append(shift(positions / 1000, s), 0.0)",
        "np.append(shift(shift(positions / 1000, s), s), 0.0)", FLOW,
    ),
    Mutation(
        "x0_without_sigma", "x0 = x - v, whatever the noise level", "cfpp/flow.py",
        "return x - expand(sigma, x) * v", "return x - v", FLOW,
    ),
    Mutation(
        "velocity_sign", "the x0 prediction is converted to a velocity of the wrong sign",
        "cfpp/flow.py", "return (x - x0) / jnp.maximum", "return (x0 - x) / jnp.maximum", FLOW,
    ),
    Mutation(
        "heun_average", "Heun's step takes the velocity at the end, not the average",
        "cfpp/flow.py", "(v + v_end) / 2", "v_end", FLOW,
    ),
    Mutation(
        "heun_past_zero", "Heun's step uses the velocity at sigma 0 in the last step",
        "cfpp/flow.py", "jnp.where(expand(sigma_next, x) > 0, (v + v_end) / 2, v)",
        "(v + v_end) / 2", FLOW,
    ),
    Mutation(
        "guidance_formula", "guidance by the other formula, w off by one", "cfpp/flow.py",
        "return v_uncond + weight *", "return v_cond + weight *", FLOW,
    ),
    Mutation(
        "sampler_sigma", "the consistency sampler predicts x0 with sigma' instead of sigma",
        "cfpp/flow.py", "interpolate(to_x0(x, v, sigma), noise, sigma_next)",
        "interpolate(to_x0(x, v, sigma_next), noise, sigma_next)", FLOW,
    ),
    Mutation(
        "sees_own_clean", "a noisy frame sees its own clean frame", "cfpp/attention/pattern.py",
        "history = (key_end < query_end) |", "history = (key_end <= query_end) |", PATTERN,
    ),
    Mutation(
        "clean_sees_noisy", "a clean frame sees its own noisy frame", "cfpp/attention/pattern.py",
        "own = same_chunk & (query_copy == key_copy)",
        "own = same_chunk & ((query_copy == key_copy) | (query_copy == CLEAN))", PATTERN,
    ),
    Mutation(
        "draws_see_draws", "noisy draws of a frame see one another", "cfpp/attention/pattern.py",
        "(query_copy == key_copy)", "((query_copy == CLEAN) == (key_copy == CLEAN))", PATTERN,
    ),
    Mutation(
        "mask_off_by_one", "a frame sees the clean frames of the chunk after its own too",
        "cfpp/attention/pattern.py", "history = (key_end < query_end)",
        "history = (key_end <= query_end + (self.chunk or 0))", PATTERN,
    ),
    Mutation(
        "window_too_long", "the window includes one frame too many", "cfpp/attention/pattern.py",
        "key_frame >= query_end - (self.window - self.sink)",
        "key_frame >= query_end - (self.window - self.sink) - 1", PATTERN,
    ),
    Mutation(
        "sink_forgotten", "the sink is not seen once the window has moved on",
        "cfpp/attention/pattern.py", "history &= recent | (key_frame < self.sink)",
        "history &= recent", PATTERN,
    ),
    Mutation(
        "empty_slots_seen", "empty cache slots are attended to", "cfpp/attention/pattern.py",
        "return (key_frame >= 0) & (((key_copy == CLEAN) & history) | own)",
        "return ((key_copy == CLEAN) & history) | own", PATTERN,
    ),
    Mutation(
        "first_chunk_ignored", "the first chunk is as long as the others",
        "cfpp/attention/pattern.py",
        "first = self.chunk if self.first_chunk is None else self.first_chunk",
        "first = self.chunk", PATTERN,
    ),
    Mutation(
        "ring_over_sink", "the cache's ring wraps over the sink", "cfpp/attention/cache.py",
        "ring = self.sink + (frame - self.sink) % (self.slots - self.sink)",
        "ring = frame % self.slots", CACHED,
    ),
    Mutation(
        "ring_off_by_one", "cache slots are off by one after the first round",
        "cfpp/attention/cache.py", "ring = self.sink + (frame - self.sink) %",
        "ring = self.sink + (frame - self.sink - (frame >= self.slots)) %", CACHED,
    ),
    Mutation(
        "rotary_in_cache", "rotary positions count from the entries, not from the clip",
        "cfpp/models/dit.py", "rotary_angles(frame, rows", "rotary_angles(frame - frame[0], rows",
        CACHED,
    ),
    Mutation(
        "time_unscaled", "the time input is sigma, not 1000 sigma", "cfpp/models/dit.py",
        "sinusoid(1000.0 * sigma,", "sinusoid(sigma,", DIFFUSERS,
    ),
    Mutation(
        "sinusoid_order", "time features are [sin, cos]", "cfpp/models/dit.py",
        "[jnp.cos(angle), jnp.sin(angle)]", "[jnp.sin(angle), jnp.cos(angle)]", DIFFUSERS,
    ),
    Mutation(
        "modulation_order", "scale and shift of the attention are swapped", "cfpp/models/dit.py",
        "shift1, scale1, gate1, shift2, scale2, gate2 = jnp",
        "scale1, shift1, gate1, shift2, scale2, gate2 = jnp", DIFFUSERS,
    ),
    Mutation(
        "straight_through_shifted", "the straight-through gradient goes to the wrong frames",
        "cfpp/models/dit.py", "((0, 0), (0, 0), (given, 0), (0, 0), (0, 0))",
        "((0, 0), (0, 0), (0, given), (0, 0), (0, 0))", REPLAYED,
    ),
    Mutation(
        "clean_at_noise", "the clean half is told the noisy half's level",
        "cfpp/models/network.py", "[jnp.zeros(clean.shape[:2]), sigma]",
        "[sigma[:, :frames], sigma]", CACHED,
    ),
    Mutation(
        "action_shifted", "actions are late by one frame in teacher forcing",
        "cfpp/models/network.py", "jnp.tile(actions, (1, 1 + draws))",
        "jnp.tile(jnp.roll(actions, 1, 1), (1, 1 + draws))", CACHED,
    ),
    Mutation(
        "drop_inverted", "conditions are kept at the rate at which they should be dropped",
        "cfpp/models/network.py", "range(1, given.ndim)), none, given",
        "range(1, given.ndim)), given, none", (f"{WIRING}condition_is_dropped_at_its_rate",),
    ),
    Mutation(
        "guidance_swapped", "conditional and unconditional velocity change places",
        "cfpp/models/network.py", "flow.guide(v[:, 0], v[:, 1],", "flow.guide(v[:, 1], v[:, 0],",
        ("tests/interop/test_diffusers.py::test_consistency_loss_and_its_gradients",),
    ),
    Mutation(
        "replay_frames", "replay numbers its frames from 0", "cfpp/models/network.py",
        "frame = np.arange(cache.slots - frames, cache.slots)", "frame = np.arange(frames)",
        REPLAYED,
    ),
    Mutation(
        "ema_inverted", "the average moves by its decay", "cfpp/stages/stage.py",
        "optax.incremental_update(params, ema, 1.0 - decay)",
        "optax.incremental_update(params, ema, decay)",
        (f"{WIRING}descent_is_clipped_averaged_and_counted",),
    ),
    Mutation(
        "ema_stays", "the average is never updated", "cfpp/stages/stage.py",
        "ema=ema)", "ema=state.ema)",
        (f"{WIRING}descent_is_clipped_averaged_and_counted",),
    ),
    Mutation(
        "accumulated_sum", "gradients of the parts are added, not averaged",
        "cfpp/stages/stage.py", "jax.tree.map(lambda x: x / parts, total)", "total",
        (f"{WIRING}descent_is_clipped_averaged_and_counted",),
    ),
    Mutation(
        "draws_share_sigma", "all draws of a clip have the same noise levels",
        "cfpp/stages/stage.py", "draw((batch, draws, chunk[-1] + 1))",
        "draw((batch, 1, chunk[-1] + 1)).repeat(draws, 1)",
        (f"{WIRING}ar_diffusion",),
    ),
    Mutation(
        "sigma_within_chunk", "the frames of a chunk have different noise levels",
        "cfpp/stages/stage.py", "chunk = pattern.chunk_index(frames)",
        "chunk = 0 * pattern.chunk_index(frames) + range(frames)", (f"{WIRING}ar_diffusion",),
    ),
    Mutation(
        "resampled_first", "a history of the model's own has a first chunk of its own too",
        "cfpp/stages/resample.py", "jnp.where(is_first, clean, x0)", "x0",
        ("tests/test_stages.py::test_a_resampled_history",),
    ),
    Mutation(
        "target_sigma", "the target converts to x0 with sigma instead of sigma'",
        "cfpp/stages/consistency.py", "flow.to_x0(x_next, ema(x_next, sigma_next), sigma_next)",
        "flow.to_x0(x_next, ema(x_next, sigma_next), sigma)", STAGES,
    ),
    Mutation(
        "target_gradient", "the target's stop-gradient is missing", "cfpp/stages/consistency.py",
        "return jax.lax.stop_gradient(flow.to_x0(", "return (flow.to_x0(",
        (f"{WIRING}target_carries_no_gradient",),
    ),
    Mutation(
        "terminal_pair", "the last pair of the grid is never drawn", "cfpp/stages/consistency.py",
        "shape, 0, size)", "shape, 0, size - 1)", (f"{WIRING}consistency",),
    ),
    Mutation(
        "target_by_student", "the target comes from the teacher instead of the average",
        "cfpp/stages/consistency.py", "network.teacher_forced(state.ema, clean",
        "network.teacher_forced(teacher_params, clean", (f"{WIRING}consistency",),
    ),
    Mutation(
        "ode_endpoint", "ODE regression stops one step before the end", "cfpp/stages/ode.py",
        "repeat_draws(path[-1]", "repeat_draws(path[-2]", (f"{WIRING}ode",),
    ),
    Mutation(
        "matching_sign", "the matching gradient points away from the data", "cfpp/stages/dmd.py",
        "return (x0_fake - x0_real) /", "return (x0_real - x0_fake) /", DMD,
    ),
    Mutation(
        "matching_gradient", "the matching loss lacks its stop-gradient", "cfpp/stages/dmd.py",
        "target = jax.lax.stop_gradient(x - g)", "target = x - g", DMD,
    ),
    Mutation(
        "matching_scale", "the matching gradient is normalised over the batch, not each clip",
        "cfpp/stages/dmd.py", "axis=(1, 2, 3, 4), keepdims=True, where=noised",
        "axis=None, keepdims=True, where=noised",
        ("tests/interop/test_diffusers.py::test_matching_gradient_and_critic_loss",),
    ),
    Mutation(
        "scores_swapped", "real and fake score change places", "cfpp/stages/dmd.py",
        "g = gradient(real, fake, x,", "g = gradient(fake, real, x,", (f"{WIRING}matching",),
    ),
    Mutation(
        "critic_stale", "every step of the critic sees the same rollout", "cfpp/stages/dmd.py",
        "lambda state, rng: train_critic(state, x0, condition, rng)",
        "lambda state, rng: train_critic(state, x0, condition, rngs[1])",
        (f"{WIRING}matching",),
    ),
    Mutation(
        "critic_on_data", "the critic is trained on data, not on the student's rollouts",
        "cfpp/stages/dmd.py", "flow.matching_loss(velocity, x, noise",
        "flow.matching_loss(velocity, x0, noise", (f"{WIRING}matching",),
    ),
    Mutation(
        "exit_never_last", "the rollout never leaves at the schedule's last step",
        "cfpp/stages/dmd.py", "(2, 1)) * (steps + 1))", "(2, 1)) * steps)",
        (f"{WIRING}matching",),
    ),
    Mutation(
        "replay_level", "replay takes the noise level of the first step, not of the exit",
        "cfpp/rollout/generate.py", "Chunk(x0, x, sigmas[last])", "Chunk(x0, x, sigmas[0])",
        REPLAYED,
    ),
    Mutation(
        "first_schedule", "the first chunk's longer schedule is ignored in stage 3",
        "cfpp/stages/dmd.py", "sigmas, _ = rollout.sampler.of_chunks(len(last))",
        "sigmas = jnp.asarray(rollout.sampler.sigmas)[np.ones(len(last), int)]", REPLAYED,
    ),
    Mutation(
        "renoise_same", "a step noises again with the noise of the step before",
        "cfpp/rollout/generate.py", "noise(frame, step + 1)", "noise(frame, step)", REPLAYED,
    ),
    Mutation(
        "noise_same", "the noise of a chunk is the same at all steps", "cfpp/rollout/generate.py",
        "jax.random.fold_in(jax.random.fold_in(rng, frame), step)",
        "jax.random.fold_in(rng, frame)", (f"{WIRING}noise_of_a_rollout_is_fresh",),
    ),
    Mutation(
        "pending_lost", "the fused step loses the pending frames", "cfpp/rollout/generate.py",
        "pending_frame=frame,", "pending_frame=0 * frame - 1,", FUSED,
    ),
    Mutation(
        "pending_action", "frames are written to the cache without their actions",
        "cfpp/rollout/generate.py", "pending_actions=actions,",
        "pending_actions=jnp.zeros_like(actions),", FUSED,
    ),
    Mutation(
        "given_without_sink", "of more given frames than the cache holds the sink is not written",
        "cfpp/rollout/generate.py",
        "(frame < pattern.sink) | (frame >= given - (slots - pattern.sink))",
        "frame >= given - (slots - pattern.sink)", FUSED,
    ),
    Mutation(
        "rollout_unguided", "a guided rollout is guided towards its own condition",
        "cfpp/rollout/generate.py",
        'actions = self.network.with_null({"actions": actions})["actions"]',
        "actions = twice(actions)",
        ("tests/test_rollout.py::test_euler_rollout_is_the_solver_on_the_exact_history",),
    ),
    Mutation(
        "matching_frames", "the matching gradient is that of the frames before the generated ones",
        "cfpp/stages/dmd.py", "g[:, given:]", "g[:, : frames - given]", (f"{WIRING}matching",),
    ),
    Mutation(
        "replay_setting", "the replay takes no notice of history_gradient", "cfpp/stages/dmd.py",
        "replay(student, params,", "replay(network, params,", (f"{WIRING}matching",),
    ),
    Mutation(
        "score_unguided", "the bidirectional real score is not guided", "cfpp/stages/dmd.py",
        "return network.bidirectional(params, condition, guidance)",
        "return network.bidirectional(params, condition)", (f"{WIRING}matching",),
    ),
    Mutation(
        "score_unshifted", "the level of scores is not shifted",
        "cfpp/stages/dmd.py", "(len(x0), 1, frames), config.score_shift)",
        "(len(x0), 1, frames), 1.0)", (f"{WIRING}matching",),
    ),
    Mutation(
        "matching_scale_held", "frames that are held clean count in the gradient's scale",
        "cfpp/stages/dmd.py", ", keepdims=True, where=noised)", ", keepdims=True)",
        ("tests/test_stages.py::test_dmd_gradient_leaves_out_frames_that_are_held",),
    ),
    Mutation(
        "held_in_loss", "stage 0 counts the held frame in its loss",
        "cfpp/stages/bidirectional.py", "jnp.mean(error * weight)", "jnp.mean(error)",
        (f"{WIRING}bidirectional",),
    ),
    Mutation(
        "held_noised", "stage 0 noises the held frame as it does the others",
        "cfpp/stages/bidirectional.py", "jnp.where(held, 0.0, sigma)",
        "jnp.broadcast_to(sigma, held.shape)", (f"{WIRING}bidirectional",),
    ),
    Mutation(
        "stream_schedule", "a stream takes the first chunk's schedule for all of its chunks",
        "cfpp/rollout/stream.py", "self._schedule = 1", "self._schedule = 0", STREAMED,
    ),
    Mutation(
        "stream_noise", "a stream noises again with the noise that the chunk started from",
        "cfpp/rollout/stream.py", "noise = gaussian_noise(rng, stream.pending[:, 0].shape)",
        "draw = gaussian_noise(rng, stream.pending[:, 0].shape)\n"
        "    noise = lambda frames, _: draw(frames, 0)", STREAMED,
    ),
    Mutation(
        "first_chunk_dropped", "a rollout from noise begins with a chunk like the others",
        "cfpp/rollout/generate.py",
        "first = None if given else pattern.first_chunk",
        "first = None", FUSED,
    ),
    Mutation(
        "negative_text", "guidance leads away from a text of zeros, whatever the negative one",
        "cfpp/models/network.py", "self.null(condition) | (null or {})", "self.null(condition)",
        (f"{SELF}guidance_away_from_a_text",),
    ),
)  # fmt: skip


def copy_tree(folder: pathlib.Path) -> pathlib.Path:
    """A copy of the working tree, with what lies in `../shared` beside it too."""
    skipped = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "runs")
    tree = shutil.copytree(ROOT, folder / "tree", ignore=skipped)
    shared = ROOT.parent / "shared"
    if shared.exists():
        (folder / "shared").symlink_to(shared.resolve())
    return tree


def failure(tree: pathlib.Path, arguments: list[str], seconds: float) -> str | None:
    """The first test that fails, 'time-out' where none has in time, None where all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *arguments]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return "time-out"
    if done.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if failed is None:
        raise RuntimeError(f"pytest ended with {done.returncode}: {done.stdout[-2000:]}")
    return failed.group(1)


def run(mutation: Mutation, tree: pathlib.Path, seconds: float) -> dict:
    """Plants one bug and looks for the test that notices it."""
    path = tree / mutation.file
    unharmed = path.read_text()
    begin = time.perf_counter()
    try:
        path.write_text(mutation.plant(unharmed))
        killer = failure(tree, list(mutation.tests), seconds)
        if killer is None:
            others = [argument for test in mutation.tests for argument in ("--deselect", test)]
            left = seconds - (time.perf_counter() - begin)
            killer = failure(tree, others, max(left, 1.0))
    finally:
        path.write_text(unharmed)
    return {
        "name": mutation.name,
        "bug": mutation.bug,
        "file": mutation.file,
        "killed_by": killer or "SURVIVED",
        "seconds": round(time.perf_counter() - begin),
    }


def write(results: dict[str, dict]) -> None:
    """Writes the results and their table, in the order of `MUTATIONS`."""
    rows = [results[m.name] for m in MUTATIONS if m.name in results]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    killed = sum(row["killed_by"] not in ("SURVIVED", "time-out") for row in rows)
    lines = [
        "# Planted bugs",
        "",
        "Would the tests notice? `python -m benchmarks.mutations` plants these bugs one at a time,",
        f"runs the suite, and writes this page. Noticed: {killed} of {len(rows)}. Seconds are from",
        "the start of the tests to the first failure.",
        "",
        "| bug | where | noticed by | seconds |",
        "|---|---|---|---|",
    ]
    for row in rows:
        killer = row["killed_by"]
        test = f"`{killer}`" if "::" in killer else f"**{killer}**"
        lines.append(f"| {row['bug']} | `{row['file']}` | {test} | {row['seconds']} |")
    TABLE.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Reads the command line, runs, and writes after every bug."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = [mutation.name for mutation in MUTATIONS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", default=names)
    parser.add_argument("--seconds", type=float, default=1500, help="for the tests of each bug")
    parser.add_argument("--unchecked", action="store_true", help="leave out the unharmed tree")
    options = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if mutation.name in options.only]
    results = {}
    if RESULTS.exists():
        results = {row["name"]: row for row in json.loads(RESULTS.read_text())}
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_tree(pathlib.Path(folder))
        for mutation in chosen:
            mutation.plant((tree / mutation.file).read_text())
        if not options.unchecked:
            tests = sorted({test for mutation in chosen for test in mutation.tests})
            failed = failure(tree, tests, len(chosen) * options.seconds)
            if failed:
                sys.exit(f"error: {failed} fails without any bug planted")
        for mutation in chosen:
            row = results[mutation.name] = run(mutation, tree, options.seconds)
            print(f"{mutation.name}: {row['killed_by']}, {row['seconds']} s", flush=True)
            write(results)
    bad = [n for n in options.only if results[n]["killed_by"] in ("SURVIVED", "time-out")]
    if bad:
        sys.exit(f"error: not noticed: {', '.join(bad)}")


if __name__ == "__main__":
    main()
