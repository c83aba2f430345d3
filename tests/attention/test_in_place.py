"""A rollout's compiled program updates its cache in place: no copy of it is ever made.

The caches are far larger than all else in these small networks, and are never allocated.
"""

import importlib.util
import os
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfpp.attention.pattern import Pattern
from cfpp.parallel import mesh, topology
from cfpp.rollout import stream as stream_module
from cfpp.rollout.generate import Rollout
from cfpp.rollout.sampler import consistency
from tests import tiny


def nbytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def shapes(rollout, batch: int, given: int = 1):
    """Shapes of the parameters, given frames, their condition and a started stream."""
    net = rollout.network
    params = jax.eval_shape(lambda key: nn.meta.unbox(net.init(key)), jax.random.key(0))
    context = tiny.latents(net, given, batch)
    condition = {"actions": tiny.actions(given, batch)}
    return params, context, condition, jax.eval_shape(rollout.start, params, context, condition)


def check_step(rollout, batch: int, platform: str, sharding=None):
    """Compiles a streaming step and compares its memory with that of the cache."""
    rollout = rollout.after(1)  # chunks of three begin anew after the frame that is given
    params, _, _, stream = shapes(rollout, batch)
    key = jax.eval_shape(lambda: jax.random.key(0))
    actions = jax.ShapeDtypeStruct((batch, rollout.network.pattern.chunk), jnp.int32)
    schedule = jax.ShapeDtypeStruct((), jnp.int32)
    arguments = params, stream.cache, stream.replace(cache=None), actions, key, schedule
    placed = jax.tree.map(lambda x: x.update(sharding=sharding), arguments)
    programs = [stream_module._generate.trace(rollout, *placed, np.dtype(np.uint8))]
    if not rollout.fused:
        programs.append(stream_module._context_pass.trace(rollout, *placed[:3]))
    for traced in programs:
        memory = traced.lower(lowering_platforms=(platform,)).compile().memory_analysis()
        assert memory.alias_size_in_bytes >= nbytes(stream.cache)
        one_layer = nbytes(stream.cache.key) / rollout.network.dit.layers
        assert memory.temp_size_in_bytes < one_layer


@pytest.mark.parametrize(("chunk", "fused"), [(1, True), (3, False)])
@pytest.mark.parametrize("dtype", ["", "int8"])
def test_a_step_on_a_cpu(chunk, fused, dtype):
    pattern = Pattern(chunk=chunk, window=8192, sink=1)
    net = tiny.network(pattern, cache_dtype=dtype)
    check_step(Rollout(net, consistency(2, 3.0), fused=fused), 2, "cpu")


def test_a_clip_on_a_cpu():
    """One cache in all, though the scan over frames reads and writes it in every pass."""
    net = tiny.network(Pattern(window=2048))
    rollout = Rollout(net, consistency(2, 3.0))
    params, _, _, stream = shapes(rollout, 2)
    context = jax.ShapeDtypeStruct((2, 1, 8, 12, net.dit.channels), np.uint8)
    memory = (
        Rollout.clip.lower(
            rollout, params, context, {"actions": tiny.actions(8)}, jax.random.key(0), 7
        )
        .compile()
        .memory_analysis()
    )
    one_layer = nbytes(stream.cache.key) / net.dit.layers
    assert nbytes(stream.cache) <= memory.temp_size_in_bytes < nbytes(stream.cache) + one_layer


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed"
)
@pytest.mark.parametrize(
    ("height", "width", "window", "chunk", "dtype"),
    [
        (16, 214, 128, 1, "int8"),  # 856 tokens: a frame is a block, which fills no tiles, as Wan's
        (16, 16, 1024, 3, ""),  # 64 tokens, several frames a block
    ],
)
def test_a_step_on_a_tpu(monkeypatch, height, width, window, chunk, dtype):
    net = tiny.network(
        Pattern(chunk=chunk, window=window, sink=1),
        height=height, width=width, patch=2, dim=256, attention="pallas_tpu",
        dtype="bfloat16", cache_dtype=dtype,
    )  # fmt: skip
    monkeypatch.setattr(mesh, "platform", lambda: "tpu")
    with mock.patch.dict(os.environ):
        topology.prepare_environment()
        sharding = jax.sharding.SingleDeviceSharding(topology.devices("v5e:2x2")[0])
        check_step(Rollout(net, consistency(2, 3.0)), 1, "tpu", sharding)
