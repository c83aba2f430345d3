"""Measures attention: cfpp's own implementations and those of libraries, against the floor.

    python benchmarks/attention.py                 # Wan 1.3B shapes on a GPU or TPU, in bfloat16
    python benchmarks/attention.py --size=20m      # what a CPU can do, in float32

Two calls are measured, on random data:

  - training: forward and backward, teacher-forced, frame-wise;
  - rollout: queries against a full cache of all layers: two frames, the fused context step's, or
    one, another step's.

The floor is the time that the visible pairs of tokens take at the measured rate of a large matrix
product (2 products forward, 5 backward), or that reading and writing every array once takes,
whichever is longer. Where PyTorch is installed, the same run measures its FlexAttention, compiled
with the same mask (training, on a GPU), and its scaled_dot_product_attention.

Writes `benchmarks/results/attention_SIZE_PLATFORM.json`.
"""

import argparse
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import measuring
import numpy as np

from cfpp.attention import dispatch, pallas_gpu, schedule
from cfpp.attention.pattern import Pattern, teacher_forced_entries

Attend = Callable[..., jax.Array]  # (q, k, v, mask, layer=None) -> out


class Size(NamedTuple):
    """Shapes of one model."""

    heads: int
    head_dim: int
    frames: int
    tokens: int
    layers: int
    dtype: str


SIZES = {
    "wan_1_3b": Size(12, 128, 21, 1560, 30, "bfloat16"),
    "wan_14b": Size(40, 128, 21, 1560, 40, "bfloat16"),
    "20m": Size(6, 64, 16, 256, 8, "float32"),
}


def teacher_forced_mask(size: Size) -> np.ndarray:
    """The mask of frame-wise training, bool `[2 * frames, 2 * frames]`."""
    entries = teacher_forced_entries(size.frames)
    return Pattern().mask(entries, entries)


def floor(size: Size, mask: np.ndarray, products: int, arrays: int, rates: dict) -> dict:
    """The least time that attention can take, in milliseconds, and of what it consists.

    Args:
      products: matrix products over the visible pairs.
      arrays: how often an array like the queries or the keys is read or written.
    """
    pairs = int(mask.sum()) * size.tokens**2 * size.heads
    operations = 2 * products * pairs * size.head_dim
    entries = arrays * sum(mask.shape) / 2 * size.tokens * size.heads * size.head_dim
    moved = entries * jnp.dtype(size.dtype).itemsize
    compute, memory = operations / rates["matmul"], moved / rates["bandwidth"]
    return {
        "tera_operations": operations / 1e12,
        "gigabytes": moved / 1e9,
        "compute_ms": 1e3 * compute,
        "memory_ms": 1e3 * memory,
        "ms": 1e3 * max(compute, memory),
    }


def arrays(size: Size, *shapes: tuple[int, ...]) -> list[jax.Array]:
    """Random arrays of the model's dtype."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    draw = jax.jit(lambda key, shape: jax.random.normal(key, shape, size.dtype), static_argnums=1)
    return [draw(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def by_name(name: str) -> Attend:
    """An implementation by its name in `config.model.attention`."""
    return lambda q, k, v, mask, layer=None: dispatch.attend(
        name, q, [(k, v, schedule.keep_static(mask), layer)]
    )


def implementations(platform: str, large: bool) -> dict[str, Attend]:
    """All that run on a platform, by name; of a large size those that do not take for ever."""
    return {
        name: by_name(name)
        for name, implementation in dispatch.IMPLEMENTATIONS.items()
        if implementation.runs_on(platform) and not (large and name in ("reference", "xla"))
    }


def by_triton(q, k, v, mask, layer=None) -> jax.Array:
    """`pallas_gpu` with its kernels for Triton, where it would take those for Hopper itself."""
    return pallas_gpu.attend(q, k, v, mask, layer, backend="triton")[0]


def training(size: Size, attend: Attend) -> float:
    """Milliseconds of forward and backward by one implementation."""
    mask = teacher_forced_mask(size)
    shape = (1, size.heads, 2 * size.frames, size.tokens, size.head_dim)
    q, k, v, d_out = arrays(size, *[shape] * 4)

    @jax.jit
    def run(q, k, v, d_out):
        out, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, mask), q, k, v)
        return out, pullback(d_out)

    return 1e3 * measuring.seconds(run, q, k, v, d_out)


def rollout(size: Size, queries: int, attend: Attend) -> float:
    """Milliseconds of one layer's attention to the cache, of some frames, by one implementation."""
    query = (1, size.heads, queries, size.tokens, size.head_dim)
    cache = (size.layers, 1, size.heads, size.frames, size.tokens, size.head_dim)
    q, k, v = arrays(size, query, cache, cache)
    mask = jnp.ones((queries, size.frames), bool)
    layer = jnp.int32(size.layers // 2)
    return 1e3 * measuring.seconds(jax.jit(attend), q, k, v, mask, layer)


def rollout_by_cudnn(size: Size, queries: int) -> float:
    """Milliseconds of cuDNN's dense attention of the same size, on keys of one layer."""
    shape = lambda frames: (1, frames * size.tokens, size.heads, size.head_dim)
    q, k, v = arrays(size, shape(queries), shape(size.frames), shape(size.frames))
    dense = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    return 1e3 * measuring.seconds(jax.jit(dense), q, k, v)


def torch_seconds(function, budget: float = 3.0) -> float:
    """As `measuring.seconds`, for PyTorch on the device that there is."""
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None

    def run():
        function()
        wait()
        return ()

    return measuring.seconds(run, budget=budget)


def torch_arrays(size: Size, *shapes: tuple[int, ...]):
    """Random tensors of the model's dtype, that want gradients."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, size.dtype)
    return [torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in shapes]


def training_by_flex(size: Size) -> float:
    """Milliseconds of FlexAttention, compiled, with the same mask in its own blocks."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length = 2 * size.frames * size.tokens
    shape = (1, size.heads, length, size.head_dim)
    q, k, v, d_out = torch_arrays(size, *[shape] * 4)
    table = torch.tensor(teacher_forced_mask(size), device=q.device)
    visible = lambda b, h, row, column: table[row // size.tokens, column // size.tokens]
    blocks = create_block_mask(visible, None, None, length, length, q.device, _compile=True)
    attend = torch.compile(flex_attention)

    def run():
        torch.autograd.grad(attend(q, k, v, block_mask=blocks), (q, k, v), d_out)

    return 1e3 * torch_seconds(run)


def training_by_sdpa(size: Size) -> float:
    """Milliseconds of scaled_dot_product_attention with the mask written out."""
    import torch

    length = 2 * size.frames * size.tokens
    q, k, v, d_out = torch_arrays(size, *[(1, size.heads, length, size.head_dim)] * 4)
    frames = teacher_forced_mask(size)
    mask = torch.tensor(frames.repeat(size.tokens, 0).repeat(size.tokens, 1), device=q.device)
    attend = torch.nn.functional.scaled_dot_product_attention

    def run():
        torch.autograd.grad(attend(q, k, v, attn_mask=mask), (q, k, v), d_out)

    return 1e3 * torch_seconds(run)


def rollout_by_sdpa(size: Size, queries: int) -> float:
    """Milliseconds of scaled_dot_product_attention without a mask, on keys of one layer."""
    import torch

    shape = lambda frames: (1, size.heads, frames * size.tokens, size.head_dim)
    q, k, v = torch_arrays(size, shape(queries), shape(size.frames), shape(size.frames))

    def run():
        with torch.no_grad():
            torch.nn.functional.scaled_dot_product_attention(q, k, v)

    return 1e3 * torch_seconds(run)


def measure(name: str, function, least: dict) -> dict:
    """One row of results; what cannot be measured says why."""
    try:
        milliseconds = function()
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        print(f"  {name:24s} not measured: {type(error).__name__}: {reason[0][:120]}")
        return {"name": name, "not_measured": f"{type(error).__name__}: {reason[0]}"}
    print(f"  {name:24s} {milliseconds:10.2f} ms, {milliseconds / least['ms']:6.2f} of the floor")
    return {"name": name, "ms": milliseconds, "over_floor": milliseconds / least["ms"]}


def main() -> None:
    """Reads the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "20m" if jax.default_backend() == "cpu" else "wan_1_3b"
    parser.add_argument("--size", choices=SIZES, default=default)
    options = parser.parse_args()
    size, platform = SIZES[options.size], jax.default_backend()
    large = 2 * size.frames * size.tokens > 20_000

    rates = {"matmul": measuring.matmul_rate(size.dtype), "bandwidth": measuring.bandwidth()}
    print(f"matmul {rates['matmul'] / 1e12:.2f} Tflop/s, copy {rates['bandwidth'] / 1e9:.0f} GB/s")
    measured = implementations(platform, large)
    if platform == "gpu":
        measured = {"pallas_gpu, triton": by_triton} | measured
    results = measuring.machine() | {"size": options.size, "shapes": size._asdict(), "rates": rates}

    def measure_all(part: str, functions: dict, least: dict) -> None:
        """Measures a part, or more of it, and writes after each row: time may run out."""
        rows = results.setdefault(part, {"floor": least, "rows": []})["rows"]
        for name, function in functions.items():
            rows.append(measure(name, function, least))
            measuring.write(f"attention_{options.size}_{platform}", results)

    mask = teacher_forced_mask(size)
    # Forward reads 3 arrays and writes 1; backward reads 5 and writes 3.
    least_training = floor(size, mask, products=7, arrays=12, rates=rates)
    print(f"training, floor {least_training['ms']:.2f} ms")
    functions = {
        name: functools.partial(training, size, attend) for name, attend in measured.items()
    }
    if platform == "gpu":
        functions["torch flex"] = functools.partial(training_by_flex, size)
    if not large:
        functions["torch sdpa"] = functools.partial(training_by_sdpa, size)
    last = {"tokamax": functions.pop("tokamax")}  # its search may use up the time that there is
    measure_all("training", functions, least_training)

    for queries in (2, 1):
        seen = np.ones((queries, size.frames), bool)
        least = floor(size, seen, products=2, arrays=4, rates=rates)
        print(f"rollout, {queries * size.tokens} queries, floor {least['ms']:.2f} ms")
        functions = {
            name: functools.partial(rollout, size, queries, attend)
            for name, attend in measured.items()
            if name not in dispatch.IMPLEMENTATIONS or dispatch.IMPLEMENTATIONS[name].cached
        }
        if platform == "gpu":
            functions["cudnn dense"] = functools.partial(rollout_by_cudnn, size, queries)
        functions["torch sdpa"] = functools.partial(rollout_by_sdpa, size, queries)
        measure_all(f"rollout_{queries * size.tokens}", functions, least)

    print("training, by tokamax")
    measure_all("training", last, least_training)


if __name__ == "__main__":
    main()
