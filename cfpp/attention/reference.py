"""Attention by the dense mask: the definition that faster implementations are tested against."""

import jax
import jax.numpy as jnp
import numpy as np


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention between the tokens of frames that see one another.

    Args:
      q: `[batch, query frames, tokens, heads, head_dim]`.
      k, v: `[batch, key frames, tokens, heads, head_dim]`.
      mask: bool `[query frames, key frames]`, True where a frame sees a frame.

    Returns:
      `[batch, query frames, tokens, heads, head_dim]`. The softmax is taken in float32. A query
      frame that sees nothing gets a finite value without meaning.
    """
    batch, _, tokens, heads, head_dim = q.shape
    flat = lambda x: x.reshape(batch, -1, heads, head_dim)  # [batch, frames * tokens, heads, dim]
    token_mask = jnp.repeat(jnp.repeat(mask, tokens, 0), tokens, 1)
    scores = jnp.einsum(
        "bqnd,bknd->bnqk", flat(q), flat(k), preferred_element_type=jnp.float32
    ) / np.sqrt(head_dim).astype(np.float32)
    scores = jnp.where(token_mask, scores, -1e30)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    # Dividing the result instead of the weights keeps one pass over [queries, keys] fewer.
    out = jnp.einsum(
        "bnqk,bknd->bqnd", weights.astype(v.dtype), flat(v), preferred_element_type=jnp.float32
    )
    return (out / weights.sum(-1).swapaxes(1, 2)[..., None]).astype(q.dtype).reshape(q.shape)
