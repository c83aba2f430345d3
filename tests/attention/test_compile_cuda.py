"""The GPU kernels compiled to machine code for H100 by XLA itself, on a machine without a GPU.

Runs where XLA's CUDA compiler is installed: `pip install jax-cuda12-plugin jax-cuda12-pjrt`, of
jaxlib's version.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from cfpp.attention import pallas_gpu
from cfpp.attention.pattern import Pattern, teacher_forced_entries

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("jax_cuda12_plugin"), reason="no CUDA compiler is installed"
)

H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000  device_memory_size: 84942979072
  driver_version: "12.8.0"  runtime_version: "12.8.0"  compile_time_toolkit_version: "12.8.0"
}
platform_name: "CUDA"
"""


@functools.cache
def device():
    described = topologies.get_topology_desc(
        "h100", platform="cuda", topology="1x1x1", target_config=H100
    )
    return jax.sharding.SingleDeviceSharding(described.devices[0])


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=device())


def compile_for_h100(function, *shapes):
    traced = jax.jit(function).trace(*shapes)
    return traced.lower(lowering_platforms=("cuda",)).compile().memory_analysis()


@pytest.mark.parametrize("backend", ["triton", "mosaic"])
@pytest.mark.parametrize("heads", [12, 40])
def test_training_at_wan_shapes(backend, heads):
    """No array of tokens x tokens: besides q, k and v in and out, a few of their size."""
    entries = teacher_forced_entries(21)
    attend = functools.partial(
        pallas_gpu.attend, mask=Pattern().mask(entries, entries), backend=backend
    )
    total = lambda *qkv: sum(jnp.sum(x.astype(jnp.float32)) for x in attend(*qkv))
    x = array(1, heads, 42, 1560, 128)
    memory = compile_for_h100(jax.grad(total, (0, 1, 2)), x, x, x)
    assert memory.temp_size_in_bytes < 3 * np.prod(x.shape) * 2


@pytest.mark.parametrize("backend", ["triton", "mosaic"])
def test_cached_attention_at_wan_shapes(backend):
    """The cache is read in place: no temporary array is as large as one layer of it."""
    cache = array(30, 1, 12, 21, 1560, 128)
    memory = compile_for_h100(
        functools.partial(pallas_gpu.attend, backend=backend),
        array(1, 12, 2, 1560, 128), cache, cache,
        array(2, 21, dtype=bool), array(dtype=jnp.int32),
    )  # fmt: skip
    assert memory.temp_size_in_bytes < np.prod(cache.shape[1:]) * 2
