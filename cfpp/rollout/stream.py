"""Video without end: programs compiled once, the cache updated in place."""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cfpp.attention.cache import Cache
from cfpp.models import codec
from cfpp.models.dit import DiT
from cfpp.models.network import Condition, Params
from cfpp.rollout.generate import Rollout, Stream, gaussian_noise


class Player:
    """Streams chunks of video, each steered by the actions given for it.

        player = Player(rollout, params, context, {"actions": given_actions}, jax.random.key(0))
        frames = player.play(actions)     # [B, chunk, H, W, C], as often as you like

    Memory and time a chunk do not grow. The frames are those of `Rollout.clip` with the same key,
    and bytes or latents as those are that it starts from. Sessions are players of their own, which
    share the parameters and what is compiled; in each, one thread at a time. The clips of a batch
    start together, and stay at the same frame.

    Args:
      rollout: the model's; its pattern's window bounds what is remembered.
      params: parameters of the network, best from `Network.for_inference`. NumPy's arrays are
        copied for each player.
      context: frames to start from, uint8 `[B, K, H, W, 3]` or float latents `[B, K, H, W, C]`; K
        may be 0. (Floats are never scaled.)
      condition: actions of these, int32 `[B, K]`, and/or text.
      rng: a key of `jax.random.key`.
      null: what to guide away from, `{"text": ...}`; see `Network.with_null`.

    Raises:
      ValueError: the pattern has no window; the frames are of another shape; an action of theirs is
        missing or unknown; a text is missing, of another shape, or nothing that the model takes;
        `null` is something else, or the rollout not guided; or `rng` is not one key.
    """

    def __init__(
        self,
        rollout: Rollout,
        params: Params,
        context: np.ndarray,
        condition: Condition,
        rng: jax.Array,
        null: Condition | None = None,
    ):
        _check_start(rollout.network.dit, context, condition, rng)
        if null is not None and (rollout.guidance is None or set(null) != {"text"}):
            raise ValueError(
                f'null is {{"text": ...}} for a rollout with guidance, got {sorted(null)} and '
                f"guidance {rollout.guidance}"
            )
        self._rollout = rollout.after(context.shape[1])
        self._params = params = jax.tree.map(jnp.asarray, params)  # where they are NumPy's
        self._rng, self._null = rng, null
        self._dtype = np.dtype(context.dtype)
        if self._rollout.network.dit.num_actions:
            given = self._actions(condition.get("actions"), context.shape[:2])
            condition = condition | {"actions": given}
        if self._rollout.network.dit.text_dim:
            self._check_text(condition.get("text"), context.shape[0])
        with self._ambient():
            started = _start(self._rollout, params, jnp.asarray(context), condition, null)
        self._stream = self._placed(started)
        self._schedule = 0  # the first chunk's, then 1

    @property
    def chunk(self) -> int:
        """Frames generated at once, next: a first chunk may be of another length than the rest."""
        return self._stream.first or self._rollout.network.pattern.chunk

    def play(self, actions: np.ndarray | None = None) -> np.ndarray:
        """Generates the next chunk.

        Args:
          actions: integers `[B, chunk]`; a model without actions needs none.

        Returns:
          `[B, chunk, H, W, C]`, of the type of the frames that the stream starts from.

        Raises:
          ValueError: an action that the model does not know, or not one for each frame.
        """
        actions = self._actions(actions, (self._stream.pending.shape[0], self.chunk))
        video = self._update(_generate, actions, self._rng, self._schedule, self._dtype)
        self._schedule = 1
        if not self._rollout.defers_context_pass(self._stream):
            # A program of its own: it runs while the caller has the frames already.
            self._update(_context_pass)
        return np.asarray(video)

    def prompt(self, text: jax.Array) -> None:
        """Changes the text, for the chunks to come.

        The last chunk before them is remembered under the new text too, where its context pass
        rides on their first step (`Rollout.fused`).

        Args:
          text: embeddings `[B, length, text_dim]`. As many as before, or all is compiled anew.

        Raises:
          ValueError: it is of another shape, or another length than `null`'s; or the model has no
            text.
        """
        self._check_text(text, self._stream.pending.shape[0])
        condition = {"text": jnp.asarray(text)}
        with self._ambient():
            told = _encode_text(self._rollout, self._params, condition, self._null)
        self._stream = self._stream.replace(text=self._placed(told))

    def state(self) -> dict[str, Any]:
        """All that the session carries but the parameters, in the host's memory, for `restore`.

        Returns:
          A tree of NumPy arrays, which can be pickled; most of it is the cache.
        """
        state = {
            "stream": self._stream,
            "key": jax.random.key_data(self._rng),
            "schedule": self._schedule,
            "first_chunk": self._rollout.network.pattern.first_chunk,  # where chunks begin
        }
        return jax.device_get(state)

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on, bit for bit, where a session was when its `state` was taken.

        Args:
          state: of a player of the same rollout, parameters and batch, in whatever process.

        Raises:
          ValueError: its cache is not like this player's.
        """
        like = lambda stream: jax.tree.map(
            lambda x: (x.shape, x.dtype), (stream.cache, stream.text)
        )
        if like(state["stream"]) != like(self._stream):
            raise ValueError("the state is of another model, batch, window or length of text")
        self._stream = self._placed(state["stream"])
        key = jnp.asarray(state["key"])
        self._rng = jax.random.wrap_key_data(key, impl=jax.random.key_impl(self._rng))
        self._schedule = state["schedule"]
        network = self._rollout.network.attending(first_chunk=state["first_chunk"])
        self._rollout = self._rollout.replace(network=network)

    def _check_text(self, text: jax.Array | None, batch: int) -> None:
        """Raises ValueError if a text is missing, or not one that the model or `null` goes with."""
        text_dim = self._rollout.network.dit.text_dim
        if not text_dim:
            raise ValueError("the model takes no text")
        texts = [text, *(self._null or {}).values()]
        shapes = [list(np.shape(each)) for each in texts]
        for each, shape in zip(texts, shapes, strict=True):
            if len(shape) != 3 or shape[::2] != [batch, text_dim] or not shape[1]:
                found = "missing" if each is None else shape
                raise ValueError(f"a text is {found}, not [{batch}, length, {text_dim}]")
        if shapes[0] != shapes[-1]:
            raise ValueError(f"a text is {shapes[0]}, but null's {shapes[-1]}: one length for both")

    def _actions(self, actions: np.ndarray | None, shape: tuple[int, int]) -> jax.Array:
        """Checked actions: an unknown one would make NaN, and a missing one would count for all."""
        known = self._rollout.network.dit.num_actions
        if actions is None:
            if known and shape[1]:
                raise ValueError(f"actions are missing, not {list(shape)}")
            actions = np.zeros(shape, np.int32)
        given = np.asarray(actions)
        if given.shape != shape:
            raise ValueError(f"actions are {list(given.shape)}, not {list(shape)}")
        if given.size and not np.issubdtype(given.dtype, np.integer):
            raise ValueError(f"actions are integers, got {given.dtype}")
        if known and given.size and not 0 <= given.min() <= given.max() < known:
            raise ValueError(f"actions are 0 to {known - 1}, got {given.min()} to {given.max()}")
        return jnp.asarray(given, jnp.int32)

    def _placed(self, tree: Any) -> Any:
        """The same, said to live on the parameters' device, if that is one.

        An empty cache, or a text, may depend on no array whose place is settled, so JAX leaves
        theirs open too. Saying it now saves the next chunk from being compiled anew.
        """
        devices = jax.tree.leaves(self._params)[0].devices()
        return jax.device_put(tree, *devices) if len(devices) == 1 else tree

    def _ambient(self) -> contextlib.AbstractContextManager:
        """The mesh on which the parameters lie, whichever thread this is."""
        mesh = getattr(jax.tree.leaves(self._params)[0].sharding, "mesh", None)
        return jax.set_mesh(mesh) if mesh else contextlib.nullcontext()

    def wait(self) -> None:
        """Waits until nothing runs any more: a context pass of its own outlasts `play`."""
        jax.block_until_ready(self._stream)

    def _update(self, program, *arguments):
        """Runs a program that updates the stream, with its cache in place."""
        rest = self._stream.replace(cache=None)
        with self._ambient():
            self._stream, out = program(
                self._rollout, self._params, self._stream.cache, rest, *arguments
            )
        return out


def _check_start(dit: DiT, context: np.ndarray, condition: Condition, rng: jax.Array) -> None:
    """Raises ValueError if a stream cannot start from what is given."""
    shape, frame = np.shape(context), (dit.height, dit.width, dit.channels)
    if len(shape) != 5 or shape[2:] != frame or not shape[0]:
        wanted = ", ".join(map(str, frame))
        raise ValueError(f"frames to start from are {list(shape)}, not [B, K, {wanted}]")
    taken = ("actions", "text") if dit.text_dim else ("actions",)
    for name in condition:
        if name not in taken:
            raise ValueError(f"the model takes no {name!r}, but {' and '.join(taken)}")
    is_key = isinstance(rng, jax.Array) and jnp.issubdtype(rng.dtype, jax.dtypes.prng_key)
    if not is_key or rng.shape:
        raise ValueError(f"rng must be one key, such as jax.random.key(0), got {rng!r:.60}")


@jax.jit
def _start(
    rollout: Rollout,
    params: Params,
    context: jax.Array,
    condition: Condition,
    null: Condition | None,
) -> Stream:
    return rollout.start(params, codec.encode(context), condition, null=null)


@jax.jit
def _encode_text(
    rollout: Rollout, params: Params, condition: Condition, null: Condition | None
) -> Any:
    return rollout.encode_text(params, condition, null)


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
