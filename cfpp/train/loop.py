"""The training loop: data, stage, state, then steps until the last one. It knows no losses."""

import collections
import contextlib
import importlib.util
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging
from clu import parameter_overview
from etils import epath
from jax.sharding import Mesh

from cfpp import stages
from cfpp.data import pipeline
from cfpp.errors import UserError, how_to_install
from cfpp.parallel import hosts, mesh
from cfpp.train import checkpoint, checks, items, metrics, program, samples, stored, workdirs

STEPS_IN_FLIGHT = 2  # dispatched and not finished: enough to keep the device busy


def train(
    config: ml_collections.ConfigDict, workdir: epath.PathLike, profile: bool = False
) -> bool:
    """Trains a stage, from its last checkpoint if there is one.

    Batches and randomness are functions of (config, step): a run that was interrupted anywhere and
    started again ends with the same bits.

    Args:
      config: of the stage, as `cfpp.train.checks` lets it pass; its data are there.
      workdir: its working directory.
      profile: write a profile of some early steps to TensorBoard.

    Returns:
      True when all steps are done; False when SIGTERM came, after saving.

    Raises:
      UserError: a fault in the configuration, a parent, the data, a checkpoint or the disk; or a
        loss that is not finite.
    """
    workdir = epath.Path(workdir)
    as_given, config = config, workdirs.resolve(config, workdir)
    stage = checks.build_stage(config)
    device_mesh = mesh.create(config.mesh)
    if checkpoint.has_begun(workdir):  # its parents are no more needed
        given = program.parent_shapes(stage, config)
    else:
        given = checks.parents(config, lambda path: stored.find(path).shapes())
    programs = programs_of(stage, config, given, device_mesh)

    with contextlib.ExitStack() as stack:
        stack.enter_context(workdirs.disk_faults(workdir, "mend that, then start again"))
        stack.enter_context(workdirs.alone(workdir))  # only now: a mistake leaves no trace
        workdirs.claim(as_given, workdir)
        data = pipeline.train_batches(
            config.data,
            config.batch_size,
            config.seed,
            mesh.rows(programs.batch, config.batch_size),
        )
        stack.enter_context(contextlib.closing(data))  # ends its workers

        checkpoints = checkpoint.Checkpoints(workdir, config.keep)
        stack.enter_context(contextlib.closing(checkpoints))
        state = checkpoints.restore(programs.state, data)
        if state is None:
            load = lambda path, sharding: stored.find(path).load(sharding)
            # Unnamed, so that nothing keeps them beside the state.
            state = programs.init(checks.parents(config, load, programs.parents))
        step = start = int(state.step)

        writer = stack.enter_context(contextlib.closing(metrics.writer(workdir, start)))
        progress = metrics.Progress(config.stage, config.steps, start)
        announce(state, device_mesh, progress, writer)
        profiler = profiler_of_steps(workdir, start, config.steps) if profile else lambda step: None
        interrupted = stack.enter_context(termination())
        stopped = False
        recent = []  # metrics since the last log
        in_flight = collections.deque()

        for step in range(start + 1, config.steps + 1):  # steps done, once this one is
            batch = jax.tree.map(
                lambda x: jax.make_array_from_process_local_data(
                    programs.batch, x, (config.batch_size, *x.shape[1:])
                ),
                next(data),
            )
            state, step_metrics = programs.step(state, batch)
            recent.append(step_metrics)
            in_flight.append(step_metrics["loss"])
            if len(in_flight) > STEPS_IN_FLIGHT:
                in_flight.popleft().block_until_ready()
            progress.step(step)
            profiler(step)

            stopped = interrupted()
            is_last = stopped or step == config.steps
            is_saved = is_last or step % config.save_every == 0
            if is_saved or step % config.log_every == 0:
                recent = jax.device_get(recent)
                first = next((i for i, m in enumerate(recent) if not np.isfinite(m["loss"])), None)
                if first is not None:
                    raise diverged("loss", step - len(recent) + 1 + first, checkpoints)
            if is_last or step % config.log_every == 0:
                means = {name: np.mean([m[name] for m in recent]) for name in step_metrics}
                rate = progress.log(step, means["loss"])
                writer.write_scalars(step, means | {"steps_per_second": rate})
                recent.clear()
            is_sampled = config.sample_every and (
                step % config.sample_every == 0 or step == config.steps
            )
            if is_saved or is_sampled:
                jax.block_until_ready(state)
            with progress.paused():
                if is_saved:
                    is_finite, fingerprint = items.inspect(state)
                    if not is_finite:
                        raise diverged("state", step, checkpoints)
                if is_sampled:  # before it is saved, or a run ended here would never draw them
                    with jax.set_mesh(device_mesh):
                        samples.draw(config, state, step, writer, workdir)
                if is_saved:
                    checkpoints.save(step, state, fingerprint, data)
            if is_last:
                break

        checkpoints.wait()
        if stopped or interrupted():  # while the last step was saved, too: no stage begins after it
            progress.say(
                f"{config.stage}: interrupted at step {step}, saved; "
                "run the same command to continue",
                everywhere=True,  # whoever started a process learns by this that it is not through
            )
            return False
        progress.say(f"{config.stage}: finished {step} steps, saved in {workdir}")
        return True


def programs_of(
    stage: stages.Stage,
    config: ml_collections.ConfigDict,
    given: dict[str, Any],
    device_mesh: Mesh,
) -> program.Program:
    """The stage's programs, for parents of given shapes by role; its step is traced.

    Raises:
      UserError: a parent does not fit, something does not divide over the mesh, or the model's
        attention does not take its shapes.
    """
    with program.tracing(config, given):
        programs = program.create(stage, config, given, device_mesh)
        # Once and for all: the first step finds this trace.
        programs.step.eval_shape(programs.state, pipeline.batch_shapes(config, programs.batch))
    return programs


def announce(
    state: Any, device_mesh: Mesh, progress: metrics.Progress, writer: metrics.Writer
) -> None:
    """Tells the size of the networks, on which devices they are, and where the run goes on."""
    overview = parameter_overview.get_parameter_overview(state.params, include_stats=False)
    logging.info("parameters:\n%s", overview)
    step = int(state.step)
    writer.write_texts(step, {"parameters": f"```\n{overview}\n```"})
    sizes = {name: parameter_overview.count_parameters(tree) for name, tree in state.params.items()}
    networks = ", ".join(f"{name} of {size:,} parameters" for name, size in sizes.items())
    axes = ", ".join(f"{axis}={size}" for axis, size in device_mesh.shape.items() if size > 1)
    devices = f"{device_mesh.size} x {device_mesh.devices.flat[0].device_kind}"
    where = f"{devices} ({axes})" if axes else devices
    going_on = f"; continuing from step {step}" if step else ""
    progress.say(f"{progress.name}: {networks}, on {where}{going_on}")


def check_profiler() -> None:
    """Raises UserError if what `--profile` needs is not installed."""
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(f"--profile needs TensorBoard; {how_to_install('tensorboard')}")


def profiler_of_steps(workdir: epath.Path, start: int, steps: int) -> Callable[[int], Any]:
    """Records steps 10 to 15 of this start for TensorBoard's profiler, if there are as many."""
    if steps - start < 16:  # a profile ends in the step after its last
        logging.warning("--profile records steps 10 to 15, but only %s are left", steps - start)
        return lambda step: None
    from clu import periodic_actions  # imports TensorFlow, so only here

    return periodic_actions.Profile(
        logdir=workdir / "tensorboard",
        first_profile=start + 10,
        num_profile_steps=5,
        profile_duration_ms=None,
        every_secs=None,
    )


@contextlib.contextmanager
def termination() -> Iterator[Callable[[], bool]]:
    """While open, SIGTERM only sets what the yielded function returns, to be asked after each step.

    Several processes agree on a step, whichever of them it was sent to: JAX catches the signal.
    """
    if jax.process_count() > 1:
        yield hosts.terminated
        return
    received = []
    before = signal.signal(signal.SIGTERM, lambda *_: received.append(True))
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGTERM, before)


def diverged(what: str, step: int, checkpoints: checkpoint.Checkpoints) -> UserError:
    """The error of a run whose numbers are no longer finite."""
    unsaved = ""
    try:
        checkpoints.wait()
    except UserError as error:  # the disk's fault comes second
        unsaved = f"; besides, {error}"
    kept = items.steps(checkpoints.directory)
    last = (
        f"the last good checkpoint is {checkpoints.directory / str(kept[-1])}"
        if kept
        else "there is no checkpoint yet"
    )
    return UserError(
        f"the {what} is not finite at step {step}; {last}; lower the learning rate or the clipping "
        f"norm, in a new --workdir{unsaved}"
    )
