"""Video without end: programs compiled once, the cache updated in place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cfpp.attention.cache import Cache
from cfpp.models import codec
from cfpp.models.network import Condition, Params
from cfpp.rollout.generate import Rollout, Stream, gaussian_noise


class Player:
    """Streams chunks of video, each steered by the actions given for it.

        player = Player(rollout, params, context, {"actions": given_actions}, jax.random.key(0))
        frames = player.play(actions)     # [B, chunk, H, W, C], as often as you like

    Memory and time a chunk do not grow. The frames are those of `Rollout.clip` with the same key,
    and bytes or latents as those are that it starts from.

    Args:
      rollout: the model's; its pattern's window bounds what is remembered.
      params: parameters of the network.
      context: frames to start from, uint8 `[B, K, H, W, 3]` or float latents `[B, K, H, W, C]`; K
        may be 0.
      condition: actions of these, int32 `[B, K]`, and/or text.
      rng: a key.

    Raises:
      ValueError: the pattern has no window.
    """

    def __init__(
        self,
        rollout: Rollout,
        params: Params,
        context: np.ndarray,
        condition: Condition,
        rng: jax.Array,
    ):
        self._rollout = rollout.after(context.shape[1])
        self._params = params = jax.tree.map(jnp.asarray, params)  # where they are NumPy's
        self._rng = rng
        self._dtype = np.dtype(context.dtype)
        self._stream = _start(self._rollout, params, jnp.asarray(context), condition)
        devices = jax.tree.leaves(params)[0].devices()
        if len(devices) == 1:
            # An empty cache depends on no parameter, so JAX leaves open where it lives. Saying so
            # now saves the second chunk from being compiled anew.
            self._stream = jax.device_put(self._stream, *devices)
        self._schedule = 0  # the first chunk's, then 1

    @property
    def chunk(self) -> int:
        """Frames generated at once, next: a first chunk may be of another length than the rest."""
        return self._stream.first or self._rollout.network.pattern.chunk

    def play(self, actions: np.ndarray) -> np.ndarray:
        """Generates the next chunk.

        Args:
          actions: int32 `[B, chunk]`.

        Returns:
          `[B, chunk, H, W, C]`, of the type of the frames that the stream starts from.

        Raises:
          ValueError: an action that the model does not know, or not one for each frame.
        """
        self._check(actions)
        actions = jnp.asarray(actions, jnp.int32)
        video = self._update(_generate, actions, self._rng, self._schedule, self._dtype)
        self._schedule = 1
        if not self._rollout.keeps(self._stream):
            # A program of its own: it runs while the caller has the frames already.
            self._update(_context_pass)
        return np.asarray(video)

    def _check(self, actions: np.ndarray) -> None:
        """A wrong action would make the stream NaN for good, and a missing one count for all."""
        given, wanted = np.asarray(actions), (self._stream.pending.shape[0], self.chunk)
        if given.shape != wanted:
            raise ValueError(f"actions are {list(given.shape)}, not {list(wanted)}")
        known = self._rollout.network.dit.num_actions
        if known and not 0 <= given.min() <= given.max() < known:
            raise ValueError(f"actions are 0 to {known - 1}, got {given.min()} to {given.max()}")

    def wait(self) -> None:
        """Waits until nothing runs any more: a context pass of its own outlasts `play`."""
        jax.block_until_ready(self._stream)

    def _update(self, program, *arguments):
        """Runs a program that updates the stream, with its cache in place."""
        rest = self._stream.replace(cache=None)
        self._stream, out = program(
            self._rollout, self._params, self._stream.cache, rest, *arguments
        )
        return out


@jax.jit
def _start(rollout: Rollout, params: Params, context: jax.Array, condition: Condition) -> Stream:
    return rollout.start(params, codec.encode(context), condition)


@functools.partial(jax.jit, donate_argnums=2, static_argnums=7)
def _generate(
    rollout: Rollout,
    params: Params,
    cache: Cache,
    stream: Stream,
    actions: jax.Array,
    rng: jax.Array,
    schedule: jax.Array,
    dtype: np.dtype,
) -> tuple[Stream, jax.Array]:
    sigmas, last = rollout.sampler.sigmas[schedule], rollout.sampler.last[schedule]
    noise = gaussian_noise(rng, stream.pending[:, 0].shape)
    stream = stream.replace(cache=cache)
    stream, chunk = rollout.generate(params, stream, actions, noise, sigmas, last)
    return stream, codec.decode(chunk.x0, dtype)


@functools.partial(jax.jit, donate_argnums=2)
def _context_pass(
    rollout: Rollout, params: Params, cache: Cache, stream: Stream
) -> tuple[Stream, None]:
    return rollout.context_pass(params, stream.replace(cache=cache)), None
