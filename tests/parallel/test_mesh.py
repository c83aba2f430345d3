"""Sharded steps, on 8 virtual devices in a process of their own."""

import subprocess
import sys

import ml_collections
import pytest

from cfpp.errors import UserError
from cfpp.parallel import mesh

PROGRAM = """
import itertools
import sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)
import numpy as np
from cfpp import stages
from cfpp.parallel import mesh
from cfpp.train import program
from configs import common
from tests.test_stages import batch, parents, tiny_config

name = sys.argv[1]

def run(**axes):
    config = tiny_config(name)
    config.batch_size = 8
    # What a gradient's rounding does to Adam's update is no matter of meshes.
    config.optimizer = common.optimizer("adamw", 1e-3)
    config.model.update({"heads": 4, "layers": 1, "unroll": 1})
    config.mesh.update(axes)
    if name == "dmd":
        config.critic_steps = 1
        config.guidance = 2.0  # or the critic, which starts as the real score, agrees with it
    stage = stages.build(config)
    devices = mesh.create(config.mesh, jax.devices()[: np.prod(list(axes.values()))])
    given = parents(config, stage)
    programs = program.create(stage, config, given, devices)
    state = programs.init(given)
    losses = []
    for i in range(2):
        state, metrics = programs.step(state, jax.device_put(batch(config, 8), programs.batch))
        losses += [float(metrics["loss"]), float(metrics["grad_norm"])]
    kernel = state.params["model"]["blocks"]["mlp_in"]["kernel"]
    return losses, kernel.addressable_shards[0].data.size / kernel.size

every = [
    sizes
    for sizes in itertools.product((1, 2, 4, 8), repeat=4)
    if np.prod(sizes) == 8 and max(sizes[2:]) <= 4  # 4 tokens, 4 heads
]
meshes = {
    "ar_diffusion": [(2, 1, 2, 2), (1, 1, 4, 2)],  # in the fast tests
    "dmd": [(1, 2, 4, 1), (1, 1, 4, 2)],  # compiles for 20 s each
}
alone, whole = run(data=1, fsdp=1, context=1, tensor=1)
assert whole == 1
for data, fsdp, context, tensor in meshes.get(name, every):
    losses, share = run(data=data, fsdp=fsdp, context=context, tensor=tensor)
    np.testing.assert_allclose(losses, alone, rtol=1e-5)
    assert share == 1 / (fsdp * context * tensor), share
print("equal")
"""


SLOW = ("bidirectional", "consistency", "ode", "dmd")


@pytest.mark.parametrize(
    "stage", ["ar_diffusion", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_every_mesh_computes_the_same(stage):
    """Tokens divided; the 4 heads divide by context and tensor, or do not (1, 1, 4, 2)."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, stage], capture_output=True, text=True)
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


@pytest.mark.parametrize(
    ("text", "message"),
    [("fsdp=16,contxt=4", "'contxt=4' is none of data=N"), ("fsdp", "'fsdp' is none of")],
)
def test_sizes_that_cannot_be_read(text, message):
    with pytest.raises(UserError, match=message):
        mesh.sizes(text)


def test_sizes_from_a_command_line():
    assert mesh.sizes("fsdp=-1,context=4") == {"data": 1, "fsdp": -1, "context": 4, "tensor": 1}
