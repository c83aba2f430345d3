"""The training loop: data, stage, state, then steps until the last one. It knows no losses."""

import collections
import contextlib
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging
from clu import parameter_overview
from etils import epath
from flax import traverse_util
from jax.sharding import Mesh

from cfpp import stages
from cfpp.data import pipeline, sources
from cfpp.errors import UserError
from cfpp.models.dit import DiT
from cfpp.parallel import hosts, mesh
from cfpp.train import checkpoint, metrics, program, samples, shapes
from cfpp.train import workdir as workdirs

MOST = 2**31 - 1  # of whole numbers: a state counts in 32 bits
BELOW_1 = 1 - 1e-6  # of averages, which at 1 would never move

OPTIMIZER_RANGES = {
    "rate": (0.0, 10.0),
    "adam_rate": (0.0, 10.0),
    "b1": (0.0, BELOW_1),
    "b2": (0.0, BELOW_1),
    "weight_decay": (0.0, 10.0),
    "clip": (1e-6, 1e9),
    "warmup": (0, MOST),
    "final_rate": (0.0, 1.0),
}

# Numbers of a stage's configuration, where it has them: the least and the greatest. What a model
# needs besides is checked where it is built.
RANGES = {
    "steps": (1, MOST),
    "batch_size": (1, MOST),
    "accumulate": (1, MOST),
    "seed": (0, 2**32 - 1),
    "log_every": (1, MOST),
    "save_every": (1, MOST),
    "sample_every": (0, MOST),
    "keep": (1, MOST),
    "draws": (1, 64),
    "shift": (0.01, 100.0),
    "score_shift": (0.01, 100.0),
    "sigma_floor": (0.0, 1.0),
    "drop_rate": (0.0, 1.0),
    "given_rate": (0.0, 1.0),
    "grid_steps": (1, 1000),
    "guidance": (0.0, 100.0),
    "ema.decay": (0.0, BELOW_1),
    "ema.start": (0, MOST),
    "data.frames": (1, MOST),
    "data.text_tokens": (0, MOST),
    "data.workers": (0, 1024),
    "data.episodes": (1, MOST),
    "data.episode_frames": (1, MOST),
    "model.rotary_base": (1.0, 1e9),
    "model.gate_init": (-100.0, 100.0),
    **{f"optimizer.{name}": limits for name, limits in OPTIMIZER_RANGES.items()},
    **{f"critic_optimizer.{name}": limits for name, limits in OPTIMIZER_RANGES.items()},
}

# Fields of a model that its parents need not share.
OWN_FIELDS = ("dtype", "cache_dtype", "attention", "remat", "unroll", "gate_init")

STEPS_IN_FLIGHT = 2  # dispatched and not finished: enough to keep the device busy


def train(
    config: ml_collections.ConfigDict, workdir: epath.PathLike, profile: bool = False
) -> bool:
    """Trains a stage, from its last checkpoint if there is one.

    Batches and randomness are functions of (config, step): a run that was interrupted anywhere and
    started again ends with the same bits.

    Args:
      config: of the stage.
      workdir: its working directory.
      profile: write a profile of some early steps to TensorBoard.

    Returns:
      True when all steps are done; False when SIGTERM ended it early, after saving.

    Raises:
      UserError: a fault in the configuration, a parent, the data, a checkpoint or the disk; or a
        loss that is not finite.
    """
    validate(config)
    workdir = epath.Path(workdir)
    as_given, config = config, workdirs.resolve(config, workdir)
    sources.check(config.data)
    if checkpoint.is_finished(workdir, config.steps):
        workdirs.claim(as_given, workdir)
        print(f"{config.stage}: finished, all {config.steps} steps are in {workdir}", flush=True)
        return True

    stage = build_stage(config)
    device_mesh = mesh.create(config.mesh)
    programs = programs_of(stage, config, device_mesh)
    check_parents(config, stage, lambda path: checkpoint.find_model(path)[1])
    workdirs.check(as_given, workdir)
    prepare(config)
    workdirs.claim(as_given, workdir)  # only now: a mistake leaves no trace

    with contextlib.ExitStack() as stack:
        stack.enter_context(workdirs.disk_faults(workdir, "mend that, then start again"))
        stack.enter_context(workdirs.alone(workdir))
        data = pipeline.train_batches(
            config.data,
            config.batch_size,
            config.seed,
            hosts.rows(programs.batch, config.batch_size),
        )
        stack.enter_context(contextlib.closing(data))  # ends its workers

        checkpoints = checkpoint.Checkpoints(workdir, config.keep)
        stack.enter_context(contextlib.closing(checkpoints))
        state = checkpoints.restore(programs.state, data)
        if state is None:
            load = lambda path, sharding: checkpoint.load_model(path, sharding)[1]
            # Unnamed, so that nothing keeps them beside the state.
            state = programs.init(parents(config, load, programs.parents))
        step = start = int(state.step)

        writer = stack.enter_context(contextlib.closing(metrics.writer(workdir, start)))
        progress = metrics.Progress(config.stage, config.steps, start)
        announce(state, progress, writer)
        profiler = profiler_of_steps(workdir, start, config.steps) if profile else lambda step: None
        interrupted = stack.enter_context(termination())
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

            is_last = interrupted() or step == config.steps
            is_saved = is_last or step % config.save_every == 0
            if is_saved or step % config.log_every == 0:
                fetched = jax.device_get(recent)
                first = next((i for i, m in enumerate(fetched) if not np.isfinite(m["loss"])), None)
                if first is not None:
                    raise diverged("loss", step - len(fetched) + 1 + first, checkpoints)
            if is_last or step % config.log_every == 0:
                means = {name: np.mean([m[name] for m in fetched]) for name in step_metrics}
                rate = progress.log(step, means["loss"])
                writer.write_scalars(step, means | {"steps_per_second": rate})
                recent.clear()
            if is_saved:
                is_finite, fingerprint = checkpoint.inspect(state)
                if not is_finite:
                    raise diverged("state", step, checkpoints)
                checkpoints.save(step, state, fingerprint, data)
            if config.sample_every and (step % config.sample_every == 0 or step == config.steps):
                with jax.set_mesh(device_mesh):
                    samples.draw(config, state, step, writer, workdir)
            if is_last:
                break

        checkpoints.wait()
        if step < config.steps:
            progress.say(
                f"{config.stage}: interrupted at step {step}, saved; "
                "run the same command to continue"
            )
            return False
        progress.say(f"{config.stage}: finished {step} steps, saved in {workdir}")
        return True


def check(
    config: ml_collections.ConfigDict, find: Callable[[str], ml_collections.ConfigDict]
) -> None:
    """Checks a stage as far as that goes without its data and a working directory.

    Args:
      config: of the stage.
      find: the configuration of a parent by its path: it may not have been trained yet.

    Raises:
      UserError: something in the configuration cannot be.
    """
    validate(config)
    sources.check(config.data)
    stage = build_stage(config)
    program.divide(stage, config, mesh.create(config.mesh))
    check_parents(config, stage, find)


def prepare(config: ml_collections.ConfigDict) -> None:
    """Records the data of a stage if they are missing, and checks them.

    Raises:
      UserError: the data cannot be had, or are not what the configuration says.
    """
    hosts.one_after_another(lambda: sources.prepare(config.data))
    samples.check(config)


def validate(config: ml_collections.ConfigDict) -> None:
    """Checks the numbers that stages have in common, and that data and model fit one another.

    Raises:
      UserError: names the first that is out of range.
    """
    fields = traverse_util.flatten_dict(config.to_dict(), sep=".")
    for name, (low, high) in RANGES.items():
        if name in fields and not low <= fields[name] <= high:
            wanted = f"at least {low}" if fields[name] < low else f"from {low} to {high}"
            raise UserError(f"config.{name} is {fields[name]}; it must be {wanted}")
    for name in ("height", "width", "num_actions"):
        if config.model[name] != config.data[name]:
            raise UserError(
                f"config.model.{name} is {config.model[name]} and config.data.{name} is "
                f"{config.data[name]}; they must be the same"
            )
    chunk, window, sink = config.pattern.chunk, config.pattern.window, config.pattern.sink
    is_causal = config.stage != "bidirectional"
    if is_causal and config.sample_every and window is None:
        raise UserError(
            "config.pattern.window is None, but sample videos are streamed in a window; give one, "
            "or set config.sample_every=0"
        )
    if is_causal and None not in (window, chunk) and window <= sink + chunk:
        raise UserError(
            f"config.pattern.window is {window}: with a sink of {sink} and chunks of {chunk} "
            f"frames no chunk sees the frame before it; give at least {sink + chunk + 1}"
        )
    if fields.get("guidance", 1.0) != 1.0 and is_untaught(config):
        raise UserError(
            f"config.guidance is {config.guidance}, but with config.drop_rate=0 the model learns "
            "no unconditional prediction; use guidance 1, or drop the condition of some clips"
        )
    # All sources that there are give pixels, and no texts; without one a job is for `cfpp.aot`.
    for name, value in {
        "data.latents": False,
        "data.text_tokens": 0,
        "model.text_dim": 0,
        "model.channels": 3,
    }.items():
        if config.data.name and fields[name] != value:
            raise UserError(
                f"config.{name} is {fields[name]}, but {config.data.name} gives RGB pixels and no "
                f"text; it must be {value}"
            )
    is_recorded = not config.data.name.startswith("tfds:")
    if is_recorded and config.data.frames > config.data.episode_frames:
        raise UserError(
            f"config.data.frames is {config.data.frames}, but episodes have "
            f"{config.data.episode_frames} frames (config.data.episode_frames); give fewer"
        )


def is_untaught(config: ml_collections.ConfigDict) -> bool:
    """Whether a model learns no unconditional prediction, unless its base has before."""
    return config.get("drop_rate") == 0.0 and not config.init_from.get("base")


def build_stage(config: ml_collections.ConfigDict) -> stages.Stage:
    """The stage of a configuration, whose parents are all named.

    Raises:
      UserError: there is no such stage, a value it cannot use, or a parent too many or too few.
    """
    try:
        stage = stages.build(config)
    except ValueError as error:
        raise UserError(str(error)) from error
    for role in config.init_from:
        if role not in stage.parents:
            raise UserError(
                f"config.init_from.{role} is no parent of stage {config.stage}, which takes "
                f"{', '.join(stage.parents) or 'none'}"
            )
    for role, parent in stage.parents.items():
        if parent.required and not config.init_from.get(role):
            raise UserError(
                f"config.init_from.{role} is not set; give the working directory or the export "
                f"of the {role} that stage {config.stage} starts from"
            )
    return stage


def parents(
    config: ml_collections.ConfigDict, load: Callable[..., Any], *more: Mapping[str, Any]
) -> dict[str, Any]:
    """Loads the parents of `config.init_from` by role.

    Args:
      config: of a stage.
      load: called with a parent's path, and with what each of `more` has for its role.
      *more: values by role.

    Raises:
      UserError: one of them cannot be loaded.
    """
    loaded = {}
    for role, path in config.init_from.items():
        try:
            if path:
                loaded[role] = load(path, *(values[role] for values in more))
        except UserError as error:
            raise UserError(f"config.init_from.{role}: {error}") from error
    return loaded


def programs_of(
    stage: stages.Stage, config: ml_collections.ConfigDict, device_mesh: Mesh
) -> program.Program:
    """The stage's programs, for parents of the shapes that are stored.

    Raises:
      UserError: a parent does not fit, or something does not divide over the mesh.
    """
    given = parents(config, checkpoint.model_shapes)
    try:
        return program.create(stage, config, given, device_mesh)
    except shapes.MismatchError as error:
        roles = ", ".join(f"{role}={config.init_from[role]}" for role in given)
        raise UserError(f"config.init_from ({roles}): {error}") from error


def check_parents(
    config: ml_collections.ConfigDict,
    stage: stages.Stage,
    find: Callable[[str], ml_collections.ConfigDict],
) -> None:
    """Checks what the shapes of parameters do not tell: that parents are used as they were trained.

    Args:
      config: of the stage.
      stage: what it builds.
      find: the configuration of a parent by its path.

    Raises:
      UserError: a parent of another architecture or stage, or guidance that it was not trained for.
        Of an unusual stage, or another attention pattern, it is told: that may be an ablation.
    """
    for role, parent in parents(config, find).items():
        where = f"config.init_from.{role}={config.init_from[role]}"
        asked = stage.parents[role]
        model = asked.model or config.model
        for name in sorted({*parent.model, *model} - set(OWN_FIELDS)):
            # What is left out has the network's default.
            theirs, own = (m.get(name, getattr(DiT, name, None)) for m in (parent.model, model))
            if theirs != own:
                raise UserError(
                    f"{where} has model.{name}={theirs!r}; this configuration's {role} should have "
                    f"{own!r}"
                )
        usual = " or ".join(asked.stages)
        if parent.stage not in asked.stages:
            if asked.strict:
                raise UserError(f"{where} is a model of stage {parent.stage}; give one of {usual}")
            logging.warning(
                "%s is a model of stage %s; stage %s starts from one of %s, and from another only "
                "to see what comes of it",
                where,
                parent.stage,
                config.stage,
                usual,
            )
        if asked.guided and config.guidance != 1.0 and is_untaught(parent):
            raise UserError(
                f"config.guidance is {config.guidance}, but {where} was trained with "
                "config.drop_rate=0 and knows no unconditional prediction; use guidance 1"
            )
        theirs, own = parent.pattern.to_dict(), config.pattern.to_dict()
        if parent.stage != "bidirectional" and theirs != own:
            logging.warning("%s was trained with config.pattern %s, not %s", where, theirs, own)


def announce(state: Any, progress: metrics.Progress, writer: metrics.Writer) -> None:
    """Tells the size of the networks, and where the run goes on."""
    overview = parameter_overview.get_parameter_overview(state.params, include_stats=False)
    logging.info("parameters:\n%s", overview)
    step = int(state.step)
    writer.write_texts(step, {"parameters": f"```\n{overview}\n```"})
    sizes = {name: parameter_overview.count_parameters(tree) for name, tree in state.params.items()}
    networks = ", ".join(f"{name} of {size:,} parameters" for name, size in sizes.items())
    progress.say(
        f"{progress.name}: {networks}" + (f"; continuing from step {step}" if step else "")
    )


def profiler_of_steps(workdir: epath.Path, start: int, steps: int) -> Callable[[int], Any]:
    """Records steps 10 to 15 of this start for TensorBoard's profiler, if there are as many."""
    try:
        from clu import periodic_actions  # imports TensorFlow, so only here
    except ImportError as error:
        raise UserError("--profile needs TensorBoard: pip install 'cfpp[tensorboard]'") from error
    if steps - start < 16:  # a profile ends in the step after its last
        logging.warning("--profile records steps 10 to 15, but only %s are left", steps - start)
        return lambda step: None
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
    checkpoints.wait()
    kept = checkpoint.steps(checkpoints.directory)
    last = (
        f"the last good checkpoint is {checkpoints.directory / str(kept[-1])}"
        if kept
        else ("there is no checkpoint yet")
    )
    return UserError(
        f"the {what} is not finite at step {step}; {last}; lower the learning rate or the clipping "
        "norm, in a new --workdir"
    )
