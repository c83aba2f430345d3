"""Tokens over devices: what is exchanged, and a rollout's divided cache. On 8 virtual devices."""

import subprocess
import sys

import pytest

SETUP = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)
import jax.numpy as jnp, numpy as np
from ml_collections import ConfigDict
from cfpp.attention.pattern import Pattern
from cfpp.parallel import compiled, mesh
from tests import tiny

def make(*sizes):
    return mesh.create(ConfigDict(dict(zip(mesh.AXES, sizes))))
"""

EXCHANGED = """
layers, batch, frames = 3, 8, 3
net = tiny.network(Pattern(), heads=4, layers=layers, height=16, width=16, remat="full")
params, sigma = tiny.params(net), jnp.full((batch, frames), 0.5)
clean, noisy = tiny.latents(net, frames, batch), tiny.latents(net, frames, batch, seed=1)
condition = {"actions": tiny.actions(frames, batch)}
devices = make(1, 2, 4, 1)
shapes = jax.eval_shape(net.init, jax.random.key(0))
shardings = mesh.state_shardings(shapes, devices)

def loss(params, clean, noisy):
    return jnp.mean(net.teacher_forced(params, clean, condition)(noisy, sigma) ** 2)

with jax.set_mesh(devices):
    by_batch = mesh.batch_sharding(devices, batch)
    step = jax.jit(jax.grad(loss), in_shardings=(shardings, by_batch, by_batch),
                   out_shardings=shardings)
    text = step.lower(params, clean, noisy).compile().as_text()
rows = compiled.collectives(text, devices)

# q, k, v and the output of attention; forward, again, and backward. Each device turns its share.
share = (batch // 2) * 2 * frames * (net.dit.tokens // 4) * net.dit.dim * 4
exchanges = [row for row in rows if row.kind == "all-to-all"]
exchanged = sum(row.received * row.times for row in exchanges if row.axes == ("context",))
assert exchanged == 12 * layers * share * 3 / 4, (exchanged, share)

# In the loop over layers nothing else is as large as the tokens of a device: what is gathered is
# parameters, what is reduced their gradients. After it, the output is gathered once.
sizes = lambda row: map(compiled._nbytes, row.shape.split("+"))
largest = max(int(np.prod(x.shape[1:])) for x in jax.tree.leaves(shapes["blocks"])) * 4
assert largest < share
for row in rows:
    if row.times >= layers and row.kind != "all-to-all":
        assert max(sizes(row)) <= largest, row
print("equal")
"""

ROLLOUT = """
from cfpp.rollout.generate import Rollout
from cfpp.rollout.sampler import consistency
net = tiny.network(Pattern(window=3, sink=1), heads=4)
params = tiny.params(net)
rollout = Rollout(net, consistency(2, 3.0))
context = np.random.default_rng(0).integers(0, 256, (1, 1, 8, 12, 2), np.uint8)
inputs = context, {"actions": tiny.actions(7, 1)}, jax.random.key(0), 6
alone = rollout.clip(params, *inputs)
shapes = jax.eval_shape(net.init, jax.random.key(0))
total = sum(x.nbytes for x in jax.tree.leaves(params))
for sizes in ((1, 2, 2, 2), (1, 1, 4, 2)):  # heads of the cache divided by 4, by 2
    devices = make(*sizes)
    divided = jax.device_put(params, mesh.state_shardings(shapes, devices))
    with jax.set_mesh(devices):
        clip = Rollout.clip.lower(rollout, divided, *inputs).compile()
        video = clip(rollout, divided, *inputs[:3])
        tiny.close(video.astype(np.int32), alone.astype(np.int32), 1 / 255)
        # Parameters are gathered for the given frame and once for the 6 chunks of 2 passes each.
        rows = compiled.collectives(clip.as_text(), devices)
        gathered = sum(row.received * row.times for row in rows if row.kind == "all-gather")
        assert gathered < 2 * total, (gathered, total)
        sharding = jax.jit(lambda: net.dit.cache(1, 3).key)().sharding
    assert sharding.shard_shape((1, 1, 4, 1, 1, 1))[2] == {2: 1, 4: 2}[sizes[2]], sharding
print("equal")
"""


# The same with scales beside the cache's values, which are divided like these.
QUANTISED = ROLLOUT.replace("heads=4)", "heads=4, cache_dtype='int8')").replace(
    "cache(1, 3).key)", "cache(1, 3).key.scale)"
)


@pytest.mark.parametrize(
    "program", [EXCHANGED, ROLLOUT, QUANTISED], ids=["exchanged", "rollout", "quantised"]
)
def test_on_8_devices(program):
    done = subprocess.run([sys.executable, "-c", SETUP + program], capture_output=True, text=True)
    assert done.stdout == "equal\n", done.stderr[-2000:]
