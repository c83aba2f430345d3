"""Between videos of bytes and the latents that networks see. Pixel models need no VAE."""

import jax
import jax.numpy as jnp


def encode(video: jax.Array) -> jax.Array:
    """Maps uint8 video to float32 latents in [-1, 1]. Floats are latents already."""
    if jnp.issubdtype(video.dtype, jnp.floating):
        return video.astype(jnp.float32)
    return video.astype(jnp.float32) / 127.5 - 1


def decode(latents: jax.Array) -> jax.Array:
    """Maps latents back to uint8 video, clipped to what a byte can hold."""
    return jnp.clip(jnp.round((latents + 1) * 127.5), 0, 255).astype(jnp.uint8)
