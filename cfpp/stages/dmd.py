"""Stage 3: asymmetric distribution matching distillation on self-rollouts, by replay.

The student rolls itself out on its own history, leaving every chunk's denoising at a random step.
For the clip x that results, one noise level sigma a clip or chunk, x_sigma noised from x, and
f(x, s) = x - s v(x, s):

    (1) g      = (f_fake(x_sigma) - f_real(x_sigma)) / mean |x - f_real(x_sigma)|
    (2) L      = 1/2 | x - stopgrad(x - g) |^2                     for the student
    (3) L_fake = | v_fake(x_sigma, sigma) - (noise - x) |^2        for the critic, on fresh rollouts

(1) is `gradient`, (2) is `loss`, and (3) is `flow.matching_loss` of the critic at a rollout x.
`real` is frozen and guided, `fake` is the critic. With `config.real_score = 'bidirectional'` both
see the whole clip at one noise level; with 'causal' both are teacher-forced on the student's own
history (context-matched distillation, arXiv 2608.13391).

**Replay.** The history carries no gradient, so every chunk's gradient depends on its own last
network pass alone. The rollout therefore runs without gradients and keeps each chunk's last input
and the cache; then one parallel pass over all chunks' last inputs, against the cached keys and
values, has the gradient of the whole unrolled loop.
"""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from cfpp import flow
from cfpp.attention.cache import Cache
from cfpp.attention.pattern import Pattern
from cfpp.models.dit import HISTORY_GRADIENTS
from cfpp.models.network import Condition, Network, Params, cast_products, of_frames
from cfpp.rollout.generate import Noise, Rollout, chunk_ends, gaussian_noise
from cfpp.rollout.sampler import Sampler, student_sampler
from cfpp.stages.stage import (
    FLOATS,
    Parent,
    Stage,
    State,
    advance,
    causal_network,
    check_choice,
    check_sigma_range,
    descend,
    draw_sigma,
    inherit,
    optimizer,
    unpack,
)

REAL_SCORES = ("bidirectional", "causal")


def gradient(
    real: flow.Velocity, fake: flow.Velocity, x: jax.Array, noise: jax.Array, sigma: jax.Array
) -> jax.Array:
    """Equation (1).

    Args:
      real, fake: velocity fields of the data's and the student's score; `real` is guided.
      x, noise: `[batch, frames, height, width, channels]`.
      sigma: `[batch, frames]`.

    Returns:
      g, like x. The mean in its denominator runs over each clip, without the frames that are held
      clean at sigma 0.
    """
    x_sigma = flow.interpolate(x, noise, sigma)
    x0_real = flow.to_x0(x_sigma, real(x_sigma, sigma), sigma)
    x0_fake = flow.to_x0(x_sigma, fake(x_sigma, sigma), sigma)
    noised = flow.expand(sigma, x) > 0
    scale = jnp.mean(jnp.abs(x - x0_real), axis=(1, 2, 3, 4), keepdims=True, where=noised)
    return (x0_fake - x0_real) / jnp.maximum(scale, 1e-6)


def loss(x: jax.Array, g: jax.Array) -> jax.Array:
    """Equation (2), one value a frame, `[batch, frames]`: its gradient in x is g / frame size."""
    target = jax.lax.stop_gradient(x - g)
    return 0.5 * jnp.mean(jnp.square(x - target), axis=(2, 3, 4))


def draw_exits(rng: jax.Array, sampler: Sampler, chunks: int) -> jax.Array:
    """The step at which each generated chunk leaves its denoising, int32 `[chunks]`.

    One is drawn for all chunks, uniformly; and one more, independent of it, for a first chunk that
    takes another number of steps.
    """
    _, steps = sampler.of_chunks(chunks)  # the last of each chunk
    first, others = jnp.floor(jax.random.uniform(rng, (2, 1)) * (steps + 1)).astype(jnp.int32)
    return jnp.where(steps == sampler.last[1], others, first)


def self_rollout(
    rollout: Rollout,
    params: Params,
    x0: jax.Array,
    condition: Condition,
    given: int,
    noise: Noise,
    last: jax.Array,
) -> tuple[Cache, jax.Array, jax.Array, jax.Array]:
    """Rolls the student out without gradients, from the first `given` frames of `x0` on.

    Args:
      rollout: the student's, with chunks counted from the given frames (`Rollout.after`).
      x0: real clips `[B, F, H, W, C]`: the given frames, and the length.
      condition: of all F frames.
      noise: `(frames, step) -> [B, chunk, H, W, C]`, of a chunk's frames.
      last: int32 `[chunks]`, the step at which each generated chunk leaves its denoising.

    Returns:
      The cache of all clean frames but the last chunk, which no other sees; the clips
      `[B, F, H, W, C]`, given frames included; and of each generated frame, the input of its last
      pass `[B, F - given, H, W, C]` and the noise level of that `[F - given]`.
    """
    frames = x0.shape[1]
    first, later = (of_frames(condition, part) for part in np.s_[:given, given:])
    stream = rollout.start(params, x0[:, :given], first, frames)
    sigmas, _ = rollout.sampler.of_chunks(len(last))
    stream, out = rollout.unroll(params, stream, later, noise, sigmas, last)
    x = jnp.concatenate([x0[:, :given], out.x0], 1)
    return jax.lax.stop_gradient((stream.cache, x, out.x, out.sigma))


def replay(
    network: Network,
    params: Params,
    cache: Cache,
    inputs: jax.Array,
    sigma: jax.Array,
    condition: Condition,
) -> jax.Array:
    """The generated frames of a self-rollout once more, as a function of the parameters.

    Args:
      network: its `dit.history_gradient` says what gradient the cache carries.
      cache, inputs, sigma: what `self_rollout` returned.

    Returns:
      `[B, F - given, H, W, C]`, equal to the rollout's generated frames.
    """
    sigma = jnp.broadcast_to(sigma, inputs.shape[:2])
    velocity = network.replay(params, cache, condition)
    return flow.to_x0(inputs, velocity(inputs, sigma), sigma)


def build(config) -> Stage:
    """Builds stage 3 from a config.

    `init_from.student` is the stage-2 model; `init_from.real` the base (stage 0) or, for a causal
    real score, the teacher (stage 1). The critic starts from `init_from.critic` or, without one,
    from `real`. `config.real_model` holds the fields in which the real score's network differs from
    `config.model`, which the student and the critic share.

    Raises:
      ValueError: a field is out of range, or a clip does not divide into chunks.
    """
    check_choice("real_score", config.real_score, REAL_SCORES)
    given, frames = config.given, config.data.frames
    check_choice("history_gradient", config.history_gradient, HISTORY_GRADIENTS)
    check_choice("frozen_dtype", config.frozen_dtype, FLOATS)
    check_sigma_range("score_sigma", config.score_sigma)
    low, high = config.score_sigma
    if not low:
        raise ValueError("config.score_sigma starts at 0, where nothing is noised; start above it")
    if config.critic_steps < 1:
        raise ValueError(f"config.critic_steps is {config.critic_steps}; it must be at least 1")
    if not 0 <= given < frames:
        raise ValueError(f"config.given is {given}; it must be at least 0 and less than {frames}")
    # Its chunks begin after the given frames in scores and rollouts alike. What is replayed is what
    # the rollout saw, so nothing is rounded.
    network = causal_network(config).clone(cache_dtype="").after(given)
    real_model = ml_collections.ConfigDict({**config.model, **config.real_model})
    try:
        real_network = Network.create(real_model, config.pattern).after(given)
    except ValueError as error:
        raise ValueError(f"with config.real_model, {error}") from error
    if config.real_model and not config.init_from.critic:
        raise ValueError(
            "init_from.critic is not set; a critic cannot start from a real score of another model"
        )
    ends = chunk_ends(network.pattern, given, frames)
    if ends[-1] != frames:
        raise ValueError(
            f"{frames} frames less {given} given ones do not divide into chunks of "
            f"{network.pattern.chunk}: the last one ends after frame {ends[-1]}"
        )
    size, sink = ends[0] - given, network.pattern.sink
    if frames < max(given, sink) + size:
        raise ValueError(
            f"data.frames is {frames}; a rollout needs room for a sink of {sink} frames and the "
            f"first chunk of {size}"
        )
    chunks = len(ends)
    sampler = student_sampler(config)
    rollout = Rollout(network.without_unrolling(), sampler)
    student = network.clone(history_gradient=config.history_gradient)
    transform = optimizer(config.optimizer, config.steps)
    critic_transform = optimizer(
        config.critic_optimizer, config.steps * config.critic_steps, "critic_optimizer"
    )
    generated = jnp.arange(frames) >= given
    is_bidirectional = config.real_score == "bidirectional"
    score_pattern = Pattern(chunk=None) if is_bidirectional else network.pattern

    def init(rng, parents):
        template = network.init(rng)
        params = inherit(template, parents["student"])
        real = inherit(real_network.init(rng), parents["real"])
        critic = inherit(template, parents["critic"]) if "critic" in parents else real
        return State(
            step=jnp.int32(0),
            params={"model": params, "critic": critic},
            optimizer={"model": transform.init(params), "critic": critic_transform.init(critic)},
            ema=params,
            frozen={"real": cast_products(real, config.frozen_dtype)},
        )

    def score(network, params, x, condition, guidance=1.0):
        if is_bidirectional:
            return network.bidirectional(params, condition, guidance)
        return network.teacher_forced(params, x, condition, guidance)

    def draw(rng, x0):
        """Exits; and for each clip a key of its rollout's noise, the scores' noise and sigma."""
        exit_rng, rollout_rng, noise_rng, sigma_rng = jax.random.split(rng, 4)
        sigma = draw_sigma(sigma_rng, score_pattern, (len(x0), 1, frames), config.score_shift)
        sigma = jnp.where(generated, jnp.clip(sigma, low, high), 0.0)
        clip_rngs = jax.random.split(rollout_rng, len(x0))
        last = draw_exits(exit_rng, sampler, chunks)
        return last, (clip_rngs, jax.random.normal(noise_rng, x0.shape), sigma)

    def fresh_clip(params, x0, condition, rngs, last):
        of_clip = lambda rng, frames, step: gaussian_noise(rng, x0.shape[2:])(frames, step)
        noise = lambda frames, step: jax.vmap(of_clip, (0, None, None))(rngs, frames, step)
        return self_rollout(rollout, params, x0, condition, given, noise, last)

    def train_critic(state, x0, condition, rng):
        last, drawn = draw(rng, x0)

        def mean_loss(params, inputs):
            x0, condition, (rngs, noise, sigma) = inputs
            _, x, _, _ = fresh_clip(state.params["model"], x0, condition, rngs, last)
            velocity = score(network, params, x, condition)
            value = flow.matching_loss(velocity, x, noise, sigma, config.sigma_floor)
            return jnp.mean(value, where=generated)

        inputs = x0, condition, drawn
        return descend(state, "critic", critic_transform, mean_loss, inputs, config.accumulate)

    def train_student(state, x0, condition, rng):
        last, drawn = draw(rng, x0)

        def mean_loss(params, inputs):
            x0, condition, (rngs, noise, score_sigma) = inputs
            before = state.params["model"]  # not `params`: the rollout has no gradient
            cache, x, last_input, sigma = fresh_clip(before, x0, condition, rngs, last)
            real = score(real_network, state.frozen["real"], x, condition, config.guidance)
            fake = score(network, state.params["critic"], x, condition)
            g = gradient(real, fake, x, noise, score_sigma)
            x_replayed = replay(student, params, cache, last_input, sigma, condition)
            return jnp.mean(loss(x_replayed, g[:, given:]))

        inputs = x0, condition, drawn
        state, metrics = descend(state, "model", transform, mean_loss, inputs, config.accumulate)
        return advance(state, config), metrics

    def step(state, batch, rng):
        x0, condition = unpack(batch)
        rngs = jax.random.split(rng, 1 + config.critic_steps)
        critic_step = lambda state, rng: train_critic(state, x0, condition, rng)
        state, critic = jax.lax.scan(critic_step, state, rngs[1:])
        state, metrics = train_student(state, x0, condition, rngs[0])
        return state, metrics | {f"critic_{name}": jnp.mean(x) for name, x in critic.items()}

    origin = {"bidirectional": "bidirectional", "causal": "ar_diffusion"}[config.real_score]
    parents = {
        "student": Parent(("consistency", "ode"), config.model),
        "real": Parent((origin,), real_model, strict=True, guided=True),
        "critic": Parent((origin,), config.model, required=False),
    }
    return Stage(init, step, parents)
