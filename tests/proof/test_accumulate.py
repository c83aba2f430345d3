"""A batch gone through in parts is the batch gone through at once, in every stage."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import optax
import pytest

from cfpp import stages
from cfpp.errors import UserError
from cfpp.parallel import mesh
from configs import common
from tests import tiny
from tests.test_stages import batch, parents, tiny_config

VARIANTS = {
    "bidirectional": {"given_rate": 0.5, "drop_rate": 0.5},
    "ar_diffusion": {"draws": 2, "drop_rate": 0.5, "resample": {"rate": 1.0}},
    "consistency": {"guidance": 2.0, "draws": 2},
    "ode": {"grid_steps": 4, "positions": (1000.0, 500.0)},
    "dmd": {"critic_steps": 1, "real_score": "bidirectional", "guidance": 2.0},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_parts_of_a_batch_make_the_step_of_the_whole(name):
    """Adam's first moment after one step is the clipped gradient: it shows all of it.

    The bound on the norm lies below the gradient's own, so that clipping each part and not their
    mean would give another.
    """

    def run(accumulate):
        config = tiny_config(name, **VARIANTS[name], accumulate=accumulate)
        config.model.update({"layers": 1, "attention": "reference"})  # compiles faster
        config.optimizer = common.optimizer("adamw", 1e-3)
        config.optimizer.clip = 1e-3
        stage = stages.build(config)
        shapes = jax.eval_shape(stage.init, jax.random.key(0), parents(config, stage))
        state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), nn.meta.unbox(shapes))
        state = state.replace(
            params={name: tiny.params_like(tree) for name, tree in state.params.items()},
            ema=tiny.params_like(state.ema, 1),
            frozen={role: tiny.params_like(tree, 2) for role, tree in state.frozen.items()},
        )
        state, metrics = jax.jit(stage.step)(state, batch(config, 4), jax.random.key(1))
        assert metrics["grad_norm"] > 2 * config.optimizer.clip
        moments = optax.tree_utils.tree_get_all_with_path(state.optimizer, "mu")
        return metrics, [tree for _, tree in moments]

    whole, parts = run(1), run(2)
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        tiny.close(a, b)


def test_a_batch_that_does_not_divide():
    devices = mesh.create(
        ml_collections.ConfigDict({"data": -1, "fsdp": 1, "context": 1, "tensor": 1})
    )
    with pytest.raises(UserError, match="batch_size is 8; it must be a multiple of 3 parts"):
        mesh.batch_sharding(devices, 8, accumulate=3)
