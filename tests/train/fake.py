"""A stage that compiles in no time, its data, and a command that trains it.

python -m tests.train.fake WORKDIR steps=40 ...
"""

import sys
from unittest import mock

import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from cfpp.errors import exit_on_user_error
from cfpp.models import shapes
from cfpp.parallel import hosts
from cfpp.stages import Parent, Stage, State
from configs import common


class TensorFlowError(Exception):
    """Looks like TensorFlow's errors, whose import takes seconds."""

    def __init__(self, error_code: int, message: str):
        super().__init__(message)
        self.error_code = error_code


def config(**changes) -> ml_collections.ConfigDict:
    fields = common.base("fake", common.parse("arena"))
    fields.update({"steps": 12, "batch_size": 4, "log_every": 2, "save_every": 4})
    fields.sample_every = 0
    fields.data.update({"name": "tfds:fake", "sizes": (1, 2)})
    fields.model.dim = 8
    fields.bad_loss_at = -1  # the step whose loss is not a number
    fields.bad_state_at = -1  # the step that ruins the state, though its loss is fine
    fields.update(changes)
    return fields.lock()


def init_model(rng, dim):
    return {"kernel": jax.random.normal(rng, (dim, dim)), "bias": jnp.zeros(dim)}


def boxed_parents(stage, config, roles):
    model = jax.eval_shape(lambda: init_model(jax.random.key(0), config.model.dim))
    return {role: model for role in roles}


def build(config: ml_collections.ConfigDict) -> Stage:
    if config.stage != "fake":
        raise ValueError(f"config.stage must be fake, got {config.stage!r}")
    transform = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(1e-2, mask={"kernel": True, "bias": False}),
    )

    def init(rng, parents):
        params = init_model(rng, config.model.dim)
        frozen = {}
        if "teacher" in parents:
            shapes.check(params, parents["teacher"], "the parent")
            params = parents["teacher"]
            frozen = {"teacher": params}
        return State(
            step=jnp.int32(0),
            params={"model": params},
            optimizer={"model": transform.init(params)},
            ema=params,
            frozen=frozen,
        )

    def step(state, batch, rng):
        x = batch["video"].astype(jnp.float32) / 255
        noise = jax.random.normal(rng, x.shape)

        def loss(params):
            return jnp.mean((x @ params["kernel"] + params["bias"] - noise) ** 2)

        value, gradient = jax.value_and_grad(loss)(state.params["model"])
        updates, optimizer = transform.update(
            gradient, state.optimizer["model"], state.params["model"]
        )
        params = optax.apply_updates(state.params["model"], updates)
        done = state.step + 1
        bad = jnp.where(done == config.bad_state_at, jnp.nan, 0.0)
        state = state.replace(
            step=done,
            params={"model": jax.tree.map(lambda x: x + bad, params)},
            optimizer={"model": optimizer},
            ema=optax.incremental_update(params, state.ema, 0.1),
        )
        return state, {"loss": jnp.where(done == config.bad_loss_at, jnp.nan, value)}

    return Stage(init, step, {"teacher": Parent(("fake",), config.model, required=False)})


def train_batches(data_config, batch_size, seed, rows=None):
    def batch(index):
        rng = np.random.default_rng(index)
        video = rng.integers(0, 256, (batch_size, DIM[0]), np.uint8)
        return {"video": video if rows is None else video[rows]}

    dataset = grain.MapDataset.range(1000).shuffle(seed=seed).repeat().map(batch)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1)))


def batch_shapes(config, sharding=None):
    shape = config.batch_size, DIM[0]
    return {"video": jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=sharding)}


DIM = [8]


def patches(dim: int = 8):
    """Puts the fake stage and its data in the place of the real ones."""
    DIM[0] = dim
    return (
        mock.patch("cfpp.stages.build", build),
        mock.patch("cfpp.train.program.boxed_parents", boxed_parents),
        mock.patch("cfpp.data.sources.prepare", lambda data_config: None),
        mock.patch("cfpp.data.pipeline.train_batches", train_batches),
        mock.patch("cfpp.data.pipeline.batch_shapes", batch_shapes),
    )


if __name__ == "__main__":
    from cfpp.train import jobs

    changes = {name: int(value) for name, value in (arg.split("=") for arg in sys.argv[2:])}
    dim = changes.pop("dim", 8)
    for patch in patches(dim):
        patch.start()
    hosts.GRACE = 0.5
    with exit_on_user_error():
        hosts.join(timeout=10)
        with hosts.ending_together():
            jobs.run(config(model={"dim": dim}, **changes), sys.argv[1])
