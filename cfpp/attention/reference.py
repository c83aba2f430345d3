"""Attention by the dense mask: the definition that faster implementations are tested against."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from cfpp.attention.cache import Cached, Quantised
from cfpp.attention.schedule import Mask

NOTHING = -1e30  # the logsumexp of a query that sees nothing
LOG2_E = math.log2(math.e)  # for kernels, whose hardware's exponential is 2^x


def attend(
    q: jax.Array, k: Cached, v: Cached, mask: Mask, layer: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention between the tokens of frames that see one another.

    Args:
      q: `[batch, heads, query frames, tokens, head_dim]`.
      k, v: `[batch, heads, key frames, tokens, head_dim]`, or those of several layers stacked;
        the latter may be `Quantised`.
      mask: bool `[query frames, key frames]`, True where a frame sees a frame: a NumPy array, or a
        JAX array where it is known only at run time.
      layer: int32 [], which of the layers in `k` and `v` to take; None where these are of one.

    Returns:
      The output, like `q`, and the logsumexp of the scaled scores, float32 `[batch, heads, query
      frames, tokens]`. A query that sees nothing gets 0 and `NOTHING`.
    """
    if layer is not None:
        k, v = jax.tree.map(lambda x: x[layer], (k, v))
    k, v = (x.restored() if isinstance(x, Quantised) else x for x in (k, v))
    *_, tokens, head_dim = q.shape
    flat = lambda x: x.reshape(*x.shape[:2], -1, head_dim)  # [B, N, frames * tokens, D]
    token_mask = jnp.repeat(jnp.repeat(mask, tokens, 0), tokens, 1)
    scores = jnp.einsum(
        "bnqd,bnkd->bnqk", flat(q), flat(k), preferred_element_type=jnp.float32
    ) / np.sqrt(head_dim).astype(np.float32)
    scores = jnp.where(token_mask, scores, NOTHING)
    largest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.where(token_mask, jnp.exp(scores - largest), 0)
    total = weights.sum(-1)
    seen = total > 0
    total = jnp.where(seen, total, 1)
    # Dividing the result instead of the weights keeps one pass over [queries, keys] fewer.
    out = jnp.einsum(
        "bnqk,bnkd->bnqd", weights.astype(v.dtype), flat(v), preferred_element_type=jnp.float32
    )
    out = (out / total[..., None]).astype(q.dtype)
    logsumexp = jnp.where(seen, largest[..., 0] + jnp.log(total), NOTHING)
    return out.reshape(q.shape), logsumexp.reshape(q.shape[:-1])
