"""One entrance to all implementations of attention, and the merging of what they return.

Every implementation is a function `attend(q, k, v, mask, layer) -> (out, logsumexp)` that computes
what `reference.attend` does; with `layer` it need not have a gradient. Those of libraries have no
logsumexp, and so cannot attend to a cache. Attention over several sets of keys, such as a cache and
the entries' own, is attention over each, merged: with o_p, L_p of part p,

    o = sum_p exp(L_p - L) o_p,    L = log sum_p exp(L_p).
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import logging

from cfpp.attention.cache import Cached, Quantised
from cfpp.attention.notice import say_once
from cfpp.attention.schedule import Mask, StaticMask, plain
from cfpp.errors import UserError
from cfpp.parallel import context, mesh


class Implementation(NamedTuple):
    """A way to attend.

    Attributes:
      function: 'module:name' of it; kernels are imported where they are used.
      platforms: on which it runs: 'cpu', 'gpu', 'tpu'; where none is named, on any.
      interpreted: whether it is a kernel that Pallas's interpreter runs on a CPU: slow, for tests.
      cached: whether it can attend to a cache; where not, 'auto' does that part of the work.
      dtypes: of queries that 'auto' leaves to it; where none is named, any.
      head_dim: of the widest heads that 'auto' leaves to it; None is any.
    """

    function: str
    platforms: tuple[str, ...] = ()
    interpreted: bool = False
    cached: bool = True
    dtypes: tuple[str, ...] = ()
    head_dim: int | None = None

    def runs_on(self, platform: str) -> bool:
        """Whether it runs there as it is, not by an interpreter."""
        return not self.platforms or platform in self.platforms


IMPLEMENTATIONS = {
    "reference": Implementation("reference:attend"),
    "xla": Implementation("xla:attend"),
    "pallas_tpu": Implementation(
        "pallas_tpu:attend", ("tpu",), interpreted=True, dtypes=("bfloat16", "float32")
    ),
    "pallas_gpu": Implementation(
        "pallas_gpu:attend",
        ("gpu",),
        interpreted=True,
        dtypes=("bfloat16", "float16", "float32"),
        head_dim=128,
    ),
    "splash": Implementation("library:splash", ("tpu",), interpreted=True, cached=False),
    "cudnn": Implementation("library:cudnn", ("gpu",), cached=False),
    "tokamax": Implementation("library:tokamax", cached=False),
}
AUTO = {"gpu": "pallas_gpu", "tpu": "pallas_tpu"}  # elsewhere, and where these cannot, xla
OLDEST_GPU = 8  # compute capability of NVIDIA's, that Triton's kernels run on


def attend(
    name: str,
    q: jax.Array,
    parts: Sequence[tuple[Cached, Cached, StaticMask | jax.Array, jax.Array | None]],
) -> jax.Array:
    """Attention over one or several sets of keys.

    Args:
      name: one of `IMPLEMENTATIONS`, or 'auto'.
      q: `[batch, heads, query frames, tokens, head_dim]`.
      parts: of each set (k, v, mask, layer) as `reference.attend` takes them, masks by
        `schedule.keep_static`.

    Returns:
      Like q.

    Raises:
      UserError: the implementation does not run on this machine.
      ValueError: there is no such implementation, or the arrays do not fit.
    """
    if name != "auto" and name not in IMPLEMENTATIONS:
        raise ValueError(f"attention is auto or one of {', '.join(IMPLEMENTATIONS)}, got {name}")
    for k, v, mask, layer in parts:
        _check_arrays(q, k, v, plain(mask), layer)
    platform = mesh.platform()
    if len(parts) > 1 and name != "auto" and not IMPLEMENTATIONS[name].cached:
        say_once(f"attention: {name}, and auto where there is a cache, which {name} does not take")
        name = "auto"
    if name == "auto":
        name = pick(platform, q.dtype, q.shape[-1])
    implementation = context.per_device(choose(name, platform))
    results = []
    for k, v, mask, layer in parts:
        if layer is None:
            results.append(implementation(q, k, v, plain(mask)))
        else:
            results.append(_attend_layer(implementation, q, k, v, mask, layer))
    if len(results) == 1:
        return results[0][0]
    outs, logsumexps = zip(*results, strict=True)
    total = functools.reduce(jnp.logaddexp, logsumexps)
    weighted = (
        out * jnp.exp(logsumexp - total)[..., None]
        for out, logsumexp in zip(outs, logsumexps, strict=True)
    )
    return sum(weighted).astype(q.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_layer(implementation, q, k, v, mask, layer):
    """Attention to one of several layers' keys, read in place; only the gradient takes it out."""
    return implementation(q, k, v, plain(mask), layer)


def _attend_layer_forward(implementation, q, k, v, mask, layer):
    if isinstance(k, Quantised):
        raise ValueError(
            f"no gradient is known through a cache in {k.dtype}, only through a plain one"
        )
    return _attend_layer(implementation, q, k, v, mask, layer), (q, k, v, mask, layer)


def _attend_layer_backward(implementation, residuals, cotangents):
    q, k, v, mask, layer = residuals
    attend_one = lambda q, k, v: implementation(q, k, v, plain(mask))
    _, pullback = jax.vjp(attend_one, q, k[layer], v[layer])
    dq, dk, dv = pullback(cotangents)
    # Mostly unused, and then never computed: a cache carries no gradient.
    dk, dv = (jnp.zeros_like(x).at[layer].set(dx) for x, dx in ((k, dk), (v, dv)))
    return dq, dk, dv, None, None


_attend_layer.defvjp(_attend_layer_forward, _attend_layer_backward)


def pick(platform: str, dtype, head_dim: int) -> str:
    """The implementation that 'auto' is, for queries of this kind; says once what it picked."""
    name, why = AUTO.get(platform, "xla"), ""
    preferred = IMPLEMENTATIONS[name]
    if preferred.dtypes and jnp.dtype(dtype).name not in preferred.dtypes:
        why = f"{name} does not take {jnp.dtype(dtype).name}"
    elif preferred.head_dim and head_dim > preferred.head_dim:
        why = f"{name} takes heads of at most {preferred.head_dim}, not {head_dim}"
    elif platform == "gpu" and (capability := mesh.compute_capability()) < OLDEST_GPU:
        why = f"{name} needs compute capability {OLDEST_GPU}.0, not {capability}"
    name = "xla" if why else name
    say_once(f"attention: auto is {name}, on {platform}" + (f": {why}" if why else ""))
    return name


@functools.cache
def choose(name: str, platform: str) -> Callable:
    """The function of an implementation, on a platform."""
    implementation = IMPLEMENTATIONS[name]
    interpreted = implementation.interpreted and platform == "cpu"
    if not implementation.runs_on(platform) and not interpreted:
        raise UserError(
            f"config.model.attention is {name}, which runs on "
            f"{' and '.join(implementation.platforms)}; this machine has {platform}: use auto"
        )
    module, _, function = implementation.function.partition(":")
    found = getattr(importlib.import_module(f"cfpp.attention.{module}"), function)
    if interpreted:
        logging.warning("attention: %s on a CPU, by Pallas's interpreter: slow", name)
        return functools.partial(found, interpret=True)
    return found


def _check_arrays(q, k, v, mask: Mask, layer) -> None:
    """Raises ValueError if arrays are not of a kind that can attend, or do not fit one another."""
    stacked = int(layer is not None)
    for name, x, rank in (("queries", q, 5), ("keys", k, 5 + stacked), ("values", v, 5 + stacked)):
        if len(x.shape) != rank:
            of = " of several layers" if rank > 5 else ""
            raise ValueError(f"{name}{of} have {rank} dimensions, got {len(x.shape)}: {x.shape}")
        if 0 in x.shape:
            raise ValueError(f"attention needs at least one of everything, got {name} of {x.shape}")
        if not isinstance(x, Quantised) and not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"attention takes {name} in floating point, got {x.dtype}")
    keys_shape, values_shape = k.shape[stacked:], v.shape[stacked:]
    batch, heads, queries, tokens, head_dim = q.shape
    keys = keys_shape[2]
    wanted = (batch, heads, keys, tokens, head_dim)
    if keys_shape != wanted or values_shape != wanted:
        raise ValueError(
            f"queries {q.shape} need keys and values of {wanted}, got {keys_shape} and "
            f"{values_shape}"
        )
    if mask.shape != (queries, keys):
        raise ValueError(
            f"a mask of {mask.shape} does not fit {queries} query and {keys} key frames"
        )
