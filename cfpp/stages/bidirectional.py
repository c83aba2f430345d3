"""Stage 0: the bidirectional base, by flow matching. All frames see all frames.

    (1) L = | v_theta(x_sigma, sigma | c) - (noise - x0) |^2        one sigma for the whole clip

With probability `config.given_rate` the first frame is held clean, at sigma 0, and left out of the
loss, so that the base can also continue a given frame.
"""

import jax
import jax.numpy as jnp

from cfpp import flow
from cfpp.models.network import Network
from cfpp.stages.stage import Parent, Stage, advance, descend, inherit, optimizer, start, unpack


def build(config) -> Stage:
    """Builds stage 0 from a config; `init_from.base`, where given, is where it starts.

    Raises:
      ValueError: the pattern is causal; or clips have one frame only, which may be given: nothing
        would be left to learn.
    """
    if config.pattern.chunk is not None:
        raise ValueError(
            f"config.pattern.chunk is {config.pattern.chunk}; in stage 0 all frames see all: leave "
            "it out"
        )
    if config.given_rate and config.data.frames < 2:
        raise ValueError(
            f"data.frames is {config.data.frames}; with a given_rate above 0 stage 0 needs 2"
        )
    network = Network.create(config.model, config.pattern)
    transform = optimizer(config.optimizer, config.steps)

    def init(rng, parents):
        return start(inherit(network.init(rng), parents.get("base")), transform)

    def step(state, batch, rng):
        x0, condition = unpack(batch)
        noise_rng, sigma_rng, given_rng, drop_rng = jax.random.split(rng, 4)
        noise = jax.random.normal(noise_rng, x0.shape)
        sigma = flow.shift(jax.random.uniform(sigma_rng, (len(x0), 1)), config.shift)
        given = jax.random.bernoulli(given_rng, config.given_rate, (len(x0), 1))
        held = given & (jnp.arange(x0.shape[1]) == 0)  # [B, F]
        sigma = jnp.where(held, 0.0, sigma)
        condition = network.drop(drop_rng, condition, config.drop_rate)

        weight = ~held / jnp.mean(~held)  # the mean over the frames that are not held

        def loss(params, inputs):
            condition, x0, noise, sigma, weight = inputs
            velocity = network.bidirectional(params, condition)
            error = flow.matching_loss(velocity, x0, noise, sigma, config.sigma_floor)
            return jnp.mean(error * weight)

        inputs = condition, x0, noise, sigma, weight
        state, metrics = descend(state, "model", transform, loss, inputs, config.accumulate)
        return advance(state, config), metrics

    base = Parent(("bidirectional",), config.model, required=False)
    return Stage(init, step, {"base": base})
