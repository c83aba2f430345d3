"""What a stage's configuration may be: told before anything is recorded, claimed or trained."""

from collections.abc import Callable, Mapping
from typing import Any

import ml_collections
from absl import logging
from flax import traverse_util

from cfpp import stages
from cfpp.attention.pattern import Pattern
from cfpp.data import sources
from cfpp.errors import UserError, first_line
from cfpp.models.dit import DiT
from cfpp.parallel import mesh
from cfpp.train import program

MOST = 2**31 - 1  # of whole numbers: a state counts in 32 bits
BELOW_1 = 1 - 1e-6  # of averages, which at 1 would never move

OPTIMIZER_RANGES = {
    "learning_rate": (0.0, 10.0),
    "adam_learning_rate": (0.0, 10.0),
    "b1": (0.0, BELOW_1),
    "b2": (0.0, BELOW_1),
    "weight_decay": (0.0, 10.0),
    "clip": (1e-6, 1e9),
    "warmup": (0, MOST),
    "final_fraction": (0.0, 1.0),
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
    "grid_doublings": (0, 9),
    "guidance": (0.0, 100.0),
    "resample.rate": (0.0, 1.0),
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

# What every stage's configuration has.
FIELDS = (
    "stage", "seed", "steps", "batch_size", "accumulate", "log_every", "save_every", "sample_every",
    "keep", "data", "model", "pattern", "mesh", "init_from",
)  # fmt: skip

# Fields of a model that its parents need not share.
OWN_FIELDS = ("dtype", "cache_dtype", "attention", "remat", "unroll", "gate_init")


def check_fields(config: ml_collections.ConfigDict) -> None:
    """Checks that a stage's configuration has what all of them have.

    Raises:
      UserError: names the first field that it lacks.
    """
    for field in FIELDS:
        if field not in config:
            raise UserError(f"config.{field} is missing; configs/common.py has what stages share")


def check(config: ml_collections.ConfigDict) -> stages.Stage:
    """Checks a stage as far as that goes without its data, its parents and a working directory.

    Args:
      config: of the stage.

    Returns:
      What it builds.

    Raises:
      UserError: something in the configuration cannot be.
    """
    validate(config)
    sources.check(config.data)
    stage = build_stage(config)
    check_pattern(config)
    program.batch_sharding(stage, config, mesh.create(config.mesh))  # that all divides
    return stage


def validate(config: ml_collections.ConfigDict) -> None:
    """Checks the numbers that stages have in common, and that data and model fit one another.

    Raises:
      UserError: names the first field that cannot be.
    """
    fields = traverse_util.flatten_dict(config.to_dict(), sep=".")
    for name, (low, high) in RANGES.items():
        if name in fields and not low <= fields[name] <= high:
            wanted = f"at least {low}" if fields[name] < low else f"from {low} to {high}"
            raise UserError(f"config.{name} is {fields[name]}; it must be {wanted}")
    for name in ("height", "width", "channels", "num_actions", "text_dim"):
        if config.model[name] != config.data[name]:
            raise UserError(
                f"config.model.{name} is {config.model[name]} and config.data.{name} is "
                f"{config.data[name]}; they must be the same"
            )
    if config.model.dtype == "float16":
        raise UserError(
            "config.model.dtype is float16, in which small gradients become 0; train in bfloat16"
        )
    is_steered = config.model.num_actions or config.model.text_dim
    if not is_steered and config.get("guidance", 1.0) != 1.0:
        raise UserError(
            f"config.guidance is {config.guidance}, but the model takes neither actions nor text; "
            "use guidance 1"
        )
    _check_data(config)


def _check_data(config: ml_collections.ConfigDict) -> None:
    is_prepared = config.data.name.startswith("tfds:")
    is_recorded = config.data.name and not is_prepared  # without a name it is only compiled for
    recordings = {"latents": False, "channels": 3, "text_tokens": 0, "text_dim": 0}
    for name, value in recordings.items():
        if is_recorded and config.data[name] != value:
            raise UserError(
                f"config.data.{name} is {config.data[name]}, but {config.data.name} gives RGB "
                f"pixels and no text; it must be {value}"
            )
    if not config.data.latents and config.data.channels != 3:
        raise UserError(
            f"config.data.channels is {config.data.channels}; pixels have 3, and latents are told "
            "by config.data.latents"
        )
    if config.data.latents and config.sample_every:
        raise UserError(
            f"config.sample_every is {config.sample_every}, but latents are no pictures; set it "
            "to 0"
        )
    if bool(config.data.text_dim) != bool(config.data.text_tokens):
        raise UserError(
            f"config.data.text_dim is {config.data.text_dim} and config.data.text_tokens is "
            f"{config.data.text_tokens}; give both, or neither"
        )
    for name, count in {"video": None, "action": "num_actions", "text": "text_tokens"}.items():
        is_taken = count is None or config.data[count]
        if is_taken and is_prepared and not config.data[f"{name}_feature"]:
            or_none = f", or set config.data.{count}=0" if count else ""
            raise UserError(
                f"config.data.{name}_feature is empty; name the feature of {config.data.name}"
                f"{or_none}"
            )
    if is_recorded and config.data.frames > config.data.episode_frames:
        raise UserError(
            f"config.data.frames is {config.data.frames}, but episodes have "
            f"{config.data.episode_frames} frames (config.data.episode_frames); give fewer"
        )


def check_history(pattern: Pattern) -> None:
    """Checks that the window of a causal pattern, if it has one, holds more than a chunk.

    Raises:
      UserError: it does not.
    """
    chunk, window, sink = pattern.chunk, pattern.window, pattern.sink
    if window is not None and window <= sink + chunk:
        raise UserError(
            f"pattern.window is {window}: with a sink of {sink} and chunks of {chunk} "
            f"frames no chunk sees the frame before it; give at least {sink + chunk + 1}"
        )


def check_pattern(config: ml_collections.ConfigDict) -> None:
    """Checks that clips and sample videos show a causal model some history.

    It also tells where streams will see what no clip of its training shows.

    Args:
      config: of a stage that can be built.

    Raises:
      UserError: they do not.
    """
    pattern, frames = Pattern(**config.pattern), config.data.frames
    if pattern.chunk is None:
        return
    if config.sample_every and pattern.window is None:
        raise UserError(
            "config.pattern.window is None, but sample videos are streamed in a window; give one, "
            "or set config.sample_every=0"
        )
    check_history(pattern)
    first = pattern.first_chunk or pattern.chunk
    if frames <= first:
        raise UserError(
            f"config.data.frames is {frames}: with a first chunk of {first} frames no chunk sees a "
            f"frame before it; give at least {first + 1}"
        )
    if pattern.window is not None and pattern.window > frames:
        logging.warning(
            "config.pattern.window is %d, but clips of config.data.frames=%d show at most as many; "
            "streams will attend further back than was trained",
            pattern.window,
            frames,
        )
    given = config.get("given", 0)
    if pattern.after(given) != pattern:
        logging.warning(
            "config.given is %d, and chunks of %d begin anew after it, as in no clip that the "
            "parents have seen; give config.pattern.first_chunk=%d, to them too, or config.given=0",
            given,
            pattern.chunk,
            given,
        )
    if config.sample_every and pattern.after(1) != pattern:
        logging.warning(
            "samples and streams start from one frame, and chunks of %d begin anew after it, as in "
            "no clip of training; give config.pattern.first_chunk=1",
            pattern.chunk,
        )


def is_untaught(
    config: ml_collections.ConfigDict, find: Callable[[str], ml_collections.ConfigDict]
) -> bool:
    """Whether a model learns no unconditional prediction, nor has what it starts from.

    Of a base that is not there any more it is not known, which is told, and taken to have.
    """
    if config.get("drop_rate") != 0.0:
        return False
    base = config.init_from.get("base")
    try:
        return not base or is_untaught(find(base), find)
    except UserError:
        logging.warning(
            "guidance needs a model that knows an unconditional prediction; this one was trained "
            "with config.drop_rate=0, and whether its base, %s, was too is not known",
            base,
        )
        return False


def build_stage(config: ml_collections.ConfigDict) -> stages.Stage:
    """The stage of a configuration, whose parents are all named.

    Raises:
      UserError: there is no such stage, a value it cannot use, or a parent too many or too few.
    """
    try:
        stage = stages.build(config)
    except ValueError as error:
        raise UserError(str(error)) from error
    except (AttributeError, KeyError) as error:  # of another stage's configuration
        field = first_line(error).strip("\"'")
        raise UserError(
            f"config.{field} is missing, a field of stage "
            f"{config.stage}; start from that stage's configuration in configs/"
        ) from error
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


def check_parents(
    config: ml_collections.ConfigDict,
    stage: stages.Stage,
    find: Callable[[str], ml_collections.ConfigDict],
) -> None:
    """Checks what the shapes of parameters do not tell: that parents are used as they were trained.

    Args:
      config: of the stage.
      stage: what it builds.
      find: the configuration of a parent by its path: it may not have been trained yet.

    Raises:
      UserError: a parent of another architecture or stage, or guidance that it, or the stage's own
        model, was not trained for. (An unusual stage, another attention pattern or more given
        frames are a warning: that may be an ablation.)
    """
    if config.get("guidance", 1.0) != 1.0 and is_untaught(config, find):
        raise UserError(
            f"config.guidance is {config.guidance}, but with config.drop_rate=0 the model learns "
            "no unconditional prediction; use guidance 1, or drop the condition of some clips"
        )
    for role, parent in parents(config, find).items():
        where = f"config.init_from.{role}={config.init_from[role]}"
        asked = stage.parents[role]
        for name in sorted({*parent.model, *asked.model} - set(OWN_FIELDS)):
            # What is left out has the network's default.
            theirs, own = (
                m.get(name, getattr(DiT, name, None)) for m in (parent.model, asked.model)
            )
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
        if asked.guided and config.guidance != 1.0 and is_untaught(parent, find):
            raise UserError(
                f"config.guidance is {config.guidance}, but {where} was trained with "
                "config.drop_rate=0 and knows no unconditional prediction; use guidance 1"
            )
        most = int(parent.get("given_rate", 0.0) > 0)
        is_causal = parent.pattern.chunk is not None
        if not is_causal and config.get("given", most) > most:
            logging.warning(
                "%s was trained with %d given frames at most, and config.given is %d",
                where,
                most,
                config.given,
            )
        if role == "real" and not is_causal:
            theirs, own = parent.data.frames, config.data.frames
            if theirs != own:
                logging.warning("%s has learned clips of %d frames, not of %d", where, theirs, own)
        theirs, own = parent.pattern.to_dict(), config.pattern.to_dict()
        if is_causal and Pattern(**theirs) != Pattern(**own):
            logging.warning("%s was trained with config.pattern %s, not %s", where, theirs, own)
