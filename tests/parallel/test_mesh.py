"""Sharded steps, on 8 virtual devices in a process of their own."""

import dataclasses
import itertools
import json
import math
import subprocess
import sys

import flax.linen as nn
import jax
import ml_collections
import pytest
from jax.sharding import AbstractMesh

from cfpp import stages
from cfpp.errors import UserError
from cfpp.parallel import mesh
from cfpp.train import program
from tests.test_stages import tiny_config

PROGRAM = """
import json
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
    if name == "ar_diffusion":
        config.resample.rate = 1.0  # or chance leaves out the pass that makes the history
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

alone, whole = run(data=1, fsdp=1, context=1, tensor=1)
assert whole == 1
for data, fsdp, context, tensor in json.loads(sys.argv[2]):
    losses, share = run(data=data, fsdp=fsdp, context=context, tensor=tensor)
    np.testing.assert_allclose(losses, alone, rtol=1e-5)
    assert share == 1 / (fsdp * context * tensor), share
print("equal")
"""


# Sizes of data, fsdp, context and tensor; a frame has 4 tokens, and attention 4 heads.
MESHES = [
    sizes
    for sizes in itertools.product((1, 2, 4, 8), repeat=4)
    if math.prod(sizes) == 8 and max(sizes[2:]) <= 4
]
# All 18 take two minutes a stage, and six in stage 3. So every stage runs on three in which every
# two axes come together, in the first with a context and a tensor that do not divide the heads; on
# the others runs the one that compiles fastest.
ALL_STAGES = [(1, 1, 4, 2), (2, 2, 2, 1), (2, 2, 1, 2)]
FAST = (2, 1, 2, 2)
OTHERS = [sizes for sizes in MESHES if sizes not in (*ALL_STAGES, FAST)]
SLOW = dict.fromkeys(("dmd", "bidirectional", "ar_diffusion", "consistency"), ALL_STAGES)
SLOW["ode"] = ALL_STAGES + OTHERS


def run(program, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True
    )
    assert done.stdout == "equal\n", done.stderr[-2000:]


def check(stage, meshes):
    run(PROGRAM, stage, json.dumps(meshes))


def test_two_meshes_compute_the_same():
    """Tokens divided; the 4 heads divide by context and tensor, or do not."""
    check("ar_diffusion", [FAST, ALL_STAGES[0]])


@pytest.mark.slow(100)
@pytest.mark.parametrize("stage", SLOW)
def test_every_mesh_computes_the_same(stage):
    """Each of the 18 in some stage, here or above."""
    check(stage, SLOW[stage])


MUON = """
import jax
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_disable_most_optimizations", True)
import numpy as np
from cfpp import stages
from cfpp.parallel import mesh
from cfpp.train import program
from configs import common
from tests.test_stages import batch, tiny_config

def run(data, fsdp):
    config = tiny_config("bidirectional")
    config.batch_size = 4
    config.optimizer = common.muon()
    config.model.update({"layers": 4, "unroll": 1})
    config.mesh.update({"data": data, "fsdp": fsdp})
    devices = mesh.create(config.mesh, jax.devices()[: data * fsdp])
    programs = program.create(stages.build(config), config, {}, devices)
    state, given = programs.init({}), jax.device_put(batch(config, 4), programs.batch)
    losses = []
    for i in range(3):
        state, metrics = programs.step(state, given)
        losses.append(float(metrics["loss"]))
    (moment,) = [
        x for path, x in jax.tree_util.tree_leaves_with_path(state.optimizer)
        if "['mlp_in']['kernel']" in jax.tree_util.keystr(path)
    ]
    return losses, moment.addressable_shards[0].data.shape

alone, (layers, rows, columns) = run(1, 1)
for data, fsdp in ((4, 1), (2, 2)):
    losses, shape = run(data, fsdp)
    np.testing.assert_allclose(losses, alone, rtol=1e-5)
    assert shape == (layers // data, rows // fsdp, columns), shape
print("equal")
"""


def test_muon_divides_blocks_where_parameters_are_repeated():
    """Moments and the products on them; the parameters come out the same."""
    run(MUON)


PARENTS = """
import sys
from types import SimpleNamespace
from unittest import mock
import jax
jax.config.update("jax_num_cpu_devices", 8)
from cfpp.models.network import Network
from cfpp.train import loop, program, stored
from tests import tiny
from tests.test_stages import tiny_config

class Arrived(Exception):
    pass

config = tiny_config("dmd")
config.batch_size, config.sample_every = 8, 0
config.mesh.update({"data": 1, "fsdp": 8})
config.real_model.ffn_dim = 64
real = {**config.model, **config.real_model}
networks = {"real": Network.create(real, config.pattern)}
values = lambda path: tiny.params(
    networks.get(path, Network.create(config.model, config.pattern))
)
config.init_from.update({"student": "student", "real": "real", "critic": "critic"})
find = lambda path: SimpleNamespace(
    shapes=lambda: jax.eval_shape(lambda: values(path)),
    load=lambda sharding: jax.device_put(values(path), sharding),
)
create = program.create

def spied(*arguments):
    programs = create(*arguments)

    def init(parents):
        state = programs.state
        become = {"student": state.ema, "critic": state.params["critic"]}
        become["real"] = state.frozen["real"]
        for role, parent in parents.items():
            where = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
            assert where(parent) == where(become[role]), role
            kernel = parent["blocks"]["mlp_in"]["kernel"]
            assert kernel.addressable_shards[0].data.size * 8 == kernel.size
        assert parents.keys() == become.keys()
        raise Arrived

    return programs._replace(init=init)

with (
    mock.patch("cfpp.data.pipeline.train_batches"),
    mock.patch.object(program, "create", spied),
    mock.patch.object(stored, "find", find),
):
    try:
        loop.train(config, sys.argv[1])
    except Arrived:
        print("equal")
"""


def test_parents_are_divided_as_soon_as_they_are_loaded(tmp_path):
    """Whole, the float32 values of a large real score would fill every device."""
    run(PARENTS, str(tmp_path / "run"))


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
    ("sizes", "message"),
    [
        (
            (1, 1, 3, 1),
            "the mesh's context is 3; it must divide the 4 tokens of a frame of config",
        ),
        ((1, 1, 1, 3), "the mesh's tensor is 3; it must divide the 2 heads of config.model"),
        ((1, 1, 1, 2), "tensor is 2; it must divide the 3 heads of the model of config.init_from"),
        ((3, 1, 1, 1), "config.batch_size is 8; it must be a multiple of the 3 devices"),
        ((2, 2, 2, 1), "a multiple of 4 parts .config.accumulate. for each of the 4 devices"),
    ],
)
def test_what_a_mesh_does_not_divide(sizes, message):
    """Of the student, of a real score with heads of its own, and of the batch."""
    config = tiny_config("dmd", batch_size=8, accumulate=4 if sizes == (2, 2, 2, 1) else 1)
    config.real_model.heads = 3
    config.init_from.critic = "runs/critic"
    with pytest.raises(UserError, match=message):
        program.create(stages.build(config), config, {}, AbstractMesh(sizes, mesh.AXES))


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh is made of."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v4"


def test_slices_divide_the_data_axis():
    chips = [
        Chip(id=4 * slice + 2 * y + x, slice_index=slice, coords=(x, y, 0))
        for slice, y, x in itertools.product(range(2), range(2), range(2))
    ]
    placed = mesh.create({"data": -1, "fsdp": 2, "context": 1, "tensor": 1}, chips).devices
    assert placed.shape == (4, 2, 1, 1)
    assert [{chip.slice_index for chip in row.flat} for row in placed] == [{0}, {0}, {1}, {1}]
    with pytest.raises(UserError, match=r"mesh\.data is 1; it must be a multiple of the 2 slices"):
        mesh.create({"data": 1, "fsdp": 8, "context": 1, "tensor": 1}, chips)


def test_an_axis_without_a_place():
    box = nn.LogicallyPartitioned(jax.ShapeDtypeStruct((4, 4), "float32"), ("embd", "mlp"))
    with pytest.raises(ValueError, match="STORED does not know"):
        mesh.state_shardings({"kernel": box}, AbstractMesh((1, 1, 1, 1), mesh.AXES))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fsdp=16,contxt=4", "'contxt=4' is none of data=N"),
        ("fsdp", "'fsdp' is none of"),
        ("fsdp=2,data=2,fsdp=4", "fsdp is there twice; give each axis once"),
    ],
)
def test_sizes_that_cannot_be_read(text, message):
    with pytest.raises(UserError, match=message):
        mesh.sizes(text)


def test_sizes_from_a_command_line():
    assert mesh.sizes("fsdp=-1,context=4") == {"data": 1, "fsdp": -1, "context": 4, "tensor": 1}
