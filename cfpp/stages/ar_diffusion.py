"""Stage 1: the many-step autoregressive teacher, by teacher forcing.

    (1) L = | v_theta(x_sigma^i, sigma_i | x0^{<i}, c) - (noise - x0^i) |^2

One forward over `[clean frames | noisy frames]`; every chunk has its own sigma. Several noisy draws
of a clip (`config.draws`) share its one clean pass. In some steps the x0^{<i} are the model's
own (`config.resample`, cfpp/stages/resample.py). Noise levels weigh alike, but for those below
`config.sigma_floor`, or by a bell (`config.bell_weight`).
"""

import jax
import jax.numpy as jnp

from cfpp import flow
from cfpp.stages.resample import resample
from cfpp.stages.stage import (
    Parent,
    Stage,
    advance,
    causal_network,
    check_sigma_range,
    descend,
    draw_sigma,
    inherit,
    optimizer,
    repeat_draws,
    start,
    unpack,
)


def build(config) -> Stage:
    """Builds stage 1 from a config; `init_from.base` is the bidirectional model it starts from.

    Raises:
      ValueError: a field is none of its choices, or out of range.
    """
    check_sigma_range("resample.sigma", config.resample.sigma)
    network = causal_network(config)
    transform = optimizer(config.optimizer, config.steps)

    def init(rng, parents):
        return start(inherit(network.init(rng), parents.get("base")), transform)

    def step(state, batch, rng):
        clean, condition = unpack(batch)
        noise_rng, sigma_rng, drop_rng, history_rng = jax.random.split(rng, 4)
        shape = (len(clean), config.draws, clean.shape[1])
        x0 = repeat_draws(clean, config.draws)
        noise = jax.random.normal(noise_rng, x0.shape)
        sigma = draw_sigma(sigma_rng, network.pattern, shape, config.shift)
        condition = network.drop(drop_rng, condition, config.drop_rate)
        model = state.params["model"]
        history = resample(history_rng, network, model, clean, condition, **config.resample)

        def loss(params, inputs):
            history, condition, x0, noise, sigma = inputs
            velocity = network.teacher_forced(params, history, condition)
            error = flow.matching_loss(velocity, x0, noise, sigma, config.sigma_floor)
            if config.bell_weight:
                error *= flow.bell_weight(sigma, config.shift)
            return jnp.mean(error)

        inputs = history, condition, x0, noise, sigma
        state, metrics = descend(state, "model", transform, loss, inputs, config.accumulate)
        return advance(state, config), metrics

    base = Parent(("bidirectional", "ar_diffusion"), config.model, required=False)
    return Stage(init, step, {"base": base})
