"""What all stages share: their state, their interface, and the optimizer's update."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import optax

from cfpp import flow
from cfpp.attention.pattern import Pattern
from cfpp.models import codec, shapes
from cfpp.models.network import Condition, Network, Params, condition_of
from cfpp.parallel import mesh

Metrics = dict[str, jax.Array]

FLOATS = ("float32", "bfloat16")  # that a state may be kept in


class State(flax.struct.PyTreeNode):
    """Everything that a stage carries from step to step, and that a checkpoint holds.

    Attributes:
      step: int32 [], optimizer steps taken.
      params: the trained networks by name; 'model' is the one that the stage is for.
      optimizer: their optimizer states, by the same names.
      ema: the average of params['model']: what later stages, rollout and export take.
      frozen: networks that only lend their output, by role.
    """

    step: jax.Array
    params: dict[str, Params]
    optimizer: dict[str, Any]
    ema: Params
    frozen: dict[str, Params]


class Parent(NamedTuple):
    """What a stage asks of a model that `config.init_from` names.

    Attributes:
      stages: those that the recipe takes it from; one of another is told, or refused if `strict`.
      model: its `config.model`.
      required: whether it must be given.
      strict: whether a model of another stage is refused.
      guided: whether `config.guidance` is for it. If it is for no parent, it is for the stage's own
        model.
    """

    stages: tuple[str, ...]
    model: ml_collections.ConfigDict
    required: bool = True
    strict: bool = False
    guided: bool = False


class Stage(NamedTuple):
    """A stage: two pure, jittable functions, and what they start from.

    Attributes:
      init: `(rng, parents) -> State`, parents by role; parameters are boxed with their logical
        axis names (`flax.linen.meta.unbox` takes these off).
      step: `(state, batch, rng) -> (state, metrics)`, with scalar metrics, one of them `loss`.
      parents: by role, the name in `config.init_from`.
    """

    init: Callable[[jax.Array, dict[str, Params]], State]
    step: Callable[[State, dict[str, jax.Array], jax.Array], tuple[State, Metrics]]
    parents: Mapping[str, Parent]


def check_choice(field: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError if a field of the config is none of its choices."""
    if value not in choices:
        raise ValueError(f"config.{field} must be one of {', '.join(choices)}, got {value!r}")


def check_sigma_range(field: str, limits: Sequence[float]) -> None:
    """Raises ValueError if a field of the config is no range of noise levels."""
    if len(limits) != 2 or not 0 <= limits[0] < limits[1] <= 1:
        raise ValueError(f"config.{field} must be a range within 0 and 1, got {limits}")


def causal_network(config: ml_collections.ConfigDict) -> Network:
    """The network of a stage whose frames see those before them.

    Raises:
      ValueError: the pattern lets all frames see all, or there is no such network.
    """
    if config.pattern.chunk is None:
        raise ValueError(
            f"config.pattern.chunk is None, with which all frames see all; stage {config.stage} "
            "needs at least 1"
        )
    return Network.create(config.model, config.pattern)


def unpack(batch: dict[str, jax.Array]) -> tuple[jax.Array, Condition]:
    """Latents and condition of a batch from the input pipeline.

    Args:
      batch: `video` `[B, F, H, W, C]`, uint8 or latents; `actions` int32 `[B, F]` and/or `text`
        float `[B, length, text_dim]`, where the data have them.

    Returns:
      The latents, float32 `[B, F, H, W, C]`, of pixels in [-1, 1]; the condition: what the batch
      has of actions and text, as it is.
    """
    return codec.encode(batch["video"]), condition_of(batch)


def inherit(template: Params, parent: Params | None) -> Params:
    """Freshly initialised parameters, with the parent's values, if there is one, in their boxes.

    These take the dtypes of the parameters: a parent may be an export in bfloat16.

    Raises:
      UserError: the parent is of another shape.
    """
    if parent is None:
        return template
    own = nn.meta.unbox(template)
    shapes.check(own, parent, "the parent", dtypes=False)
    values = jax.tree.map(lambda value, like: value.astype(like.dtype), parent, own)
    return nn.meta.replace_boxed(template, values)


def optimizer(
    config: ml_collections.ConfigDict, steps: int, group: str = "optimizer"
) -> optax.GradientTransformation:
    """The optimizer of `config.optimizer`: 'adamw' or 'muon', clipped, warmed up and decayed.

    Muon orthogonalises the updates of all matrices; Adam moves everything else, at
    `adam_learning_rate` or, where the configuration has none, at `learning_rate`. `b1` and `b2` are
    Adam's. `weight_decay` is of all parameters under 'adamw', of Muon's matrices alone under
    'muon'. The cosine ends at the share `final_fraction` of the peak or, without one, at 0.

    Args:
      config: the fields of `group`.
      steps: updates in all.
      group: what the configuration of the stage calls it.

    Raises:
      ValueError: a field is none of its choices.
    """
    final_fraction = config.get("final_fraction", 0.0)
    adam_peak = config.get("adam_learning_rate", config.learning_rate)
    schedules = {
        "constant": lambda peak: optax.schedules.warmup_constant_schedule(
            0.0 if config.warmup else peak,  # where it stays for ever without a warmup
            peak,
            config.warmup,
        ),
        "cosine": lambda peak: optax.schedules.warmup_cosine_decay_schedule(
            0.0, peak, config.warmup, max(steps, config.warmup + 1), final_fraction * peak
        ),
    }
    check_choice(f"{group}.schedule", config.schedule, tuple(schedules))
    check_choice(f"{group}.name", config.name, ("adamw", "muon"))
    check_choice(f"{group}.mu_dtype", config.mu_dtype, FLOATS)
    schedule = schedules[config.schedule]
    if config.name == "adamw":
        update = optax.adamw(
            schedule(config.learning_rate),
            config.b1,
            config.b2,
            weight_decay=config.weight_decay,
            mu_dtype=config.mu_dtype,
        )
    else:
        muon = optax.contrib.muon(
            schedule(config.learning_rate),
            adam_learning_rate=schedule(adam_peak),
            adam_b1=config.b1,
            adam_b2=config.b2,
            mu_dtype=config.mu_dtype,
            weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=_matrices,
        )
        update = _divided(muon)
    return optax.chain(optax.clip_by_global_norm(config.clip), update)


def _matrices(params: Params) -> Any:
    """Muon's dimension numbers: all kernels, `[in, out]` or, in the blocks, `[layers, in, out]`."""

    def number(path, leaf):
        if not _is_kernel(path):
            return None
        return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(number, params)


def _is_kernel(path: tuple) -> bool:
    return "kernel" in [getattr(key, "key", None) for key in path]


def _divided(muon: optax.GradientTransformation) -> optax.GradientTransformation:
    """Muon, with the blocks divided over the data axis, which would do the same many times.

    There each device keeps the moments of some blocks and orthogonalises their matrices; then the
    updates are gathered, as parameters are repeated there.
    """
    name = "layers_to_work_on"
    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)

    def init(params):
        def rename(path, box):
            is_stack = is_box(box) and _is_kernel(path) and box.names[0] == "layers"
            return box.replace(names=(name, *box.names[1:])) if is_stack else box

        return jax.tree_util.tree_map_with_path(rename, muon.init(params), is_leaf=is_box)

    def update(updates, state, params=None):
        def divide(path, leaf):
            return mesh.store_first(leaf, name) if _is_kernel(path) and leaf.ndim == 3 else leaf

        updates = jax.tree_util.tree_map_with_path(divide, updates)
        return muon.update(updates, state, params)

    return optax.GradientTransformation(init, update)


def accumulated(
    loss: Callable, params: Params, inputs: Any, parts: int
) -> tuple[jax.Array, Params]:
    """Value and gradient of a loss over a batch that is gone through in equal parts.

    Args:
      loss: `(params, inputs) -> []`, a mean over the clips of `inputs`, none of which counts more
        in a part than in the whole batch.
      inputs: arrays whose first axis is the batch; `parts` divides it. Part i has every `parts`-th
        clip from the i-th on, so that each device keeps its clips.

    Returns:
      What `jax.value_and_grad(loss)(params, inputs)` does, in the memory of one part.
    """
    gradient = jax.value_and_grad(loss)
    if parts == 1:
        return gradient(params, inputs)
    deal = lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
    add = lambda total, part: (jax.tree.map(jnp.add, total, gradient(params, part)), None)
    zero = jnp.float32(0), jax.tree.map(jnp.zeros_like, params)
    total, _ = jax.lax.scan(add, zero, jax.tree.map(deal, inputs))
    return jax.tree.map(lambda x: x / parts, total)


def descend(
    state: State,
    name: str,
    transform: optax.GradientTransformation,
    loss: Callable,
    inputs: Any,
    accumulate: int,
) -> tuple[State, Metrics]:
    """One optimizer step of `params[name]` on the scalar `loss(params, inputs)`.

    The batch is gone through in `accumulate` parts, one after another: see `accumulated`.

    Returns:
      The new state, whose step and average are as before; the metrics `loss` and `grad_norm`.
    """
    params = state.params[name]
    value, gradient = accumulated(loss, params, inputs, accumulate)
    updates, optimizer_state = transform.update(gradient, state.optimizer[name], params)
    state = state.replace(
        params=state.params | {name: optax.apply_updates(params, updates)},
        optimizer=state.optimizer | {name: optimizer_state},
    )
    return state, {"loss": value, "grad_norm": optax.tree.norm(gradient)}


def average(
    ema: Params, params: Params, step: jax.Array, config: ml_collections.ConfigDict
) -> Params:
    """The exponential moving average after a step: a plain copy until step `config.start`.

    From there on its n-th step keeps at most (1 + n) / (10 + n) of what it was, so that a short run
    is no average of its first parameters.
    """
    n = step - config.start
    decay = jnp.where(n < 0, 0.0, jnp.minimum(config.decay, (1 + n) / (10 + n)))
    return optax.incremental_update(params, ema, 1.0 - decay)


def advance(state: State, config: ml_collections.ConfigDict) -> State:
    """Ends a step: counts it, and takes the new parameters of 'model' into their average."""
    ema = average(state.ema, state.params["model"], state.step, config.ema)
    return state.replace(step=state.step + 1, ema=ema)


def start(
    params: Params, transform: optax.GradientTransformation, frozen: dict[str, Params] | None = None
) -> State:
    """The first state of a stage that trains one network."""
    return State(
        step=jnp.int32(0),
        params={"model": params},
        optimizer={"model": transform.init(params)},
        ema=params,
        frozen=frozen or {},
    )


def per_chunk(
    draw: Callable[[tuple[int, int, int]], jax.Array], pattern: Pattern, shape: tuple[int, int, int]
) -> jax.Array:
    """Random numbers of noisy draws, one for each chunk, which all its frames share.

    Args:
      draw: `(shape) -> array`, independent numbers.
      shape: (batch, draws, frames).

    Returns:
      `[batch, draws * frames]`.
    """
    batch, draws, frames = shape
    chunk = pattern.chunk_index(frames)
    return draw((batch, draws, chunk[-1] + 1))[:, :, chunk].reshape(batch, draws * frames)


def draw_sigma(
    rng: jax.Array, pattern: Pattern, shape: tuple[int, int, int], s: float
) -> jax.Array:
    """Noise levels, uniform before the shift by `s`, one for each chunk of each draw.

    Args:
      shape: (batch, draws, frames).

    Returns:
      float32 `[batch, draws * frames]`.
    """
    return flow.shift(per_chunk(lambda shape: jax.random.uniform(rng, shape), pattern, shape), s)


def repeat_draws(x: jax.Array, draws: int) -> jax.Array:
    """`draws` copies of a clip's frames, one after another: `[batch, draws * frames, ...]`."""
    return jnp.tile(x, (1, draws) + (1,) * (x.ndim - 2))
