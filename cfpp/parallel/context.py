"""Attention over a mesh: from tokens to heads and back, and the part of each device.

Outside attention the context axis divides the tokens *within* every frame. Masks are about frames,
so every device has the same work under any mask; modulation is by frame and needs nothing from
other devices; positions are divided like their tokens.

Attention needs all tokens of the heads it works on. Where the heads divide, an all-to-all over the
context axis turns a share of the tokens of all heads into all tokens of a share of the heads, and
one more turns the output back. Where they do not, queries stay, and keys and values are gathered.
The cache of a rollout is laid out as attention wants it, so one stream uses several devices.

Arrays are head-major, `[B, N, E, T, D]`: batch, heads, entries, tokens, head_dim.
"""

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from cfpp.attention.cache import cut
from cfpp.parallel import mesh

TOKENS = ("batch", "heads", None, "tokens", None)  # the layout outside attention
HEADS = ("batch", "heads_within_attention", None, None, None)  # and inside


def to_heads(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values as attention wants them."""
    if mesh.ambient() is None:
        return q, k, v
    q, k, v = (mesh.constrain(x, *TOKENS) for x in (q, k, v))
    if _exchanges(q.shape):
        return tuple(_exchange(x, TOKENS, HEADS, split_axis=1, concat_axis=3) for x in (q, k, v))
    return q, mesh.constrain(k, *HEADS), mesh.constrain(v, *HEADS)


def to_tokens(out: jax.Array) -> jax.Array:
    """The output of attention as everything else wants it."""
    if mesh.ambient() is not None and _exchanges(out.shape):
        return _exchange(out, HEADS, TOKENS, split_axis=3, concat_axis=1)
    return out


def constrain_cache(x: jax.Array) -> jax.Array:
    """Lays out a cache's keys or values `[L, B, N, S, T, D]`, or scales `[L, B, N, S, 1, T]`."""
    return mesh.constrain(x, None, *HEADS)


def per_device(attend: Callable) -> Callable:
    """An implementation of attention that each device runs on its part; see `attention.dispatch`.

    Args:
      attend: `(q, k, v, mask, layer) -> (out, logsumexp)`, as `attention.reference.attend`.
    """

    def run(q, k, v, mask, layer=None):
        if mesh.ambient() is None:
            return attend(q, k, v, mask, layer)
        q_spec = mesh.used(q.shape, *(HEADS if _divides_heads(q.shape[1]) else TOKENS))
        stacked = () if layer is None else (None,)
        k_spec = lambda x: PartitionSpec(*stacked, *mesh.used(x.shape[len(stacked) :], *HEADS))
        arrays = {"q": q, "k": k, "v": v}
        specs = {"q": q_spec, **jax.tree.map(k_spec, {"k": k, "v": v})}
        if isinstance(mask, jax.Array):
            arrays["mask"], specs["mask"] = mask, PartitionSpec()
        if layer is not None:
            arrays["layer"], specs["layer"] = layer, PartitionSpec()
        constant = {"mask": mask, "layer": layer}
        return jax.shard_map(
            lambda arrays: attend(**_same_tokens(**(constant | arrays))),
            in_specs=(specs,),
            out_specs=(q_spec, PartitionSpec(*q_spec[:4])),
            check_vma=False,  # kernels do not tell it
        )(arrays)

    return run


def _same_tokens(q, k, v, mask, layer):
    """Cuts frames of keys into parts of as many tokens as there are queries of a frame here."""
    parts = k.shape[-2] // q.shape[-2]
    if parts > 1:
        k, v = (cut(x, q.shape[-2]) for x in (k, v))
        mask = mask.repeat(parts, 1)
    return {"q": q, "k": k, "v": v, "mask": mask, "layer": layer}


def _divides_heads(heads: int) -> bool:
    sizes = mesh.ambient().shape
    return heads % (sizes["tensor"] * sizes["context"]) == 0


def _exchanges(shape: tuple[int, ...]) -> bool:
    """Whether an all-to-all leads from tokens to heads: both divide."""
    context = mesh.ambient().shape["context"]
    return context > 1 and _divides_heads(shape[1]) and shape[3] % context == 0


def _exchange(x, before, after, **axes):
    return jax.shard_map(
        lambda part: jax.lax.all_to_all(part, "context", tiled=True, **axes),
        in_specs=mesh.used(x.shape, *before),
        out_specs=mesh.used(x.shape, *after),
        check_vma=False,
    )(x)
