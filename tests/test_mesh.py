"""Sharded steps, on 8 virtual devices in a process of their own."""

import subprocess
import sys

import ml_collections
import pytest

from cfpp.errors import UserError
from cfpp.parallel import mesh

PROGRAM = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)
import flax.linen as nn, numpy as np
from cfpp import stages
from cfpp.parallel import mesh
from configs import common
from tests.test_stages import batch, tiny_config

def run(**axes):
    config = tiny_config("ar_diffusion")
    config.model.update({"layers": 1, "unroll": 1})
    config.mesh.update(axes)
    config.optimizer = common.optimizer("adamw", 1e-3)
    stage = stages.build(config)
    key = jax.random.key(0)
    devices = mesh.create(config.mesh, jax.devices()[: np.prod(list(axes.values()))])
    shardings = mesh.state_shardings(jax.eval_shape(lambda: stage.init(key, {})), devices)
    state = jax.jit(lambda: nn.meta.unbox(stage.init(key, {})), out_shardings=shardings)()
    step = jax.jit(stage.step, out_shardings=(shardings, None), donate_argnums=0)
    on_mesh = jax.device_put(batch(config, 8), mesh.batch_sharding(devices, 8))
    losses = []
    for i in range(2):
        state, metrics = step(state, on_mesh, jax.random.key(i))
        losses.append(float(metrics["loss"]))
    kernel = state.params["model"]["blocks"]["mlp_in"]["kernel"]
    return losses, kernel.addressable_shards[0].data.size / kernel.size

alone, whole = run(data=1, fsdp=1, context=1, tensor=1)
assert whole == 1
for axes in ({"data": 8, "fsdp": 1, "context": 1, "tensor": 1},
             {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}):
    losses, share = run(**axes)
    np.testing.assert_allclose(losses, alone, rtol=1e-5)
    assert share == 1 / (axes["fsdp"] * axes["tensor"]), share
print("equal")
"""


def test_every_mesh_computes_the_same():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.stdout == "equal\n", done.stderr[-2000:]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 1, 1, 1), "data=3, fsdp=1, context=1, tensor=1; it does not multiply to 1 devices"),
        ((-1, -1, 1, 1), "at most one of them -1"),
        ((0, 1, 1, 1), "sizes are at least 1"),
    ],
)
def test_meshes_that_do_not_fit(sizes, message):
    with pytest.raises(UserError, match=message):
        mesh.create(ml_collections.ConfigDict(dict(zip(mesh.AXES, sizes, strict=True))))
