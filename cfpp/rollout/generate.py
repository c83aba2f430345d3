"""Causal generation, chunk by chunk, with a cache of the clean frames before.

For every chunk: start at noise; at each noise level of the sampler evaluate the network and step
down; at the last one predict x0. The clean chunk then goes through the network once at sigma 0,
which gives the keys and values that later chunks attend to. That *context pass* is

  - separate: S + 1 passes a chunk, the last of which may run when the chunk has been handed out
    and nothing is asked for yet (latency), or
  - fused with the next chunk's first step, one pass over `[clean i | noisy i + 1]`: S passes a
    chunk (throughput). The result is the same up to rounding, that of a cache in 8 bits included.

All noise is a function of (seed, frame number, step), so a clip rolled out in one scan, frame by
frame or as a stream is one and the same.

A clip from noise begins with the pattern's first chunk, which may be of another length than all the
others. It takes a program of its own, and its context pass is never fused.
"""

import functools
from collections.abc import Callable
from typing import Any

import einops
import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from cfpp import flow
from cfpp.attention.cache import Cache
from cfpp.attention.pattern import CLEAN, Pattern
from cfpp.errors import UserError
from cfpp.models import codec
from cfpp.models.network import Condition, Network, Params, guide_pairs, of_frames, twice
from cfpp.rollout.sampler import TEACHER_STEPS, Sampler, euler, student_sampler

# (frames, step) -> noise of these frames, int32 [F], at a step: [B, F, H, W, C].
Noise = Callable[[jax.Array, jax.Array], jax.Array]


class Stream(flax.struct.PyTreeNode):
    """All that generation carries from one chunk to the next.

    Attributes:
      cache: clean frames so far, but for the pending ones; batch doubled under guidance.
      text: keys and values of the text, or None.
      frame: int32 [], the next frame to generate.
      pending: clean latents `[B, chunk, H, W, C]` that the next pass will write to the cache,
      pending_frame: their frame numbers, int32 `[chunk]`, -1 where there is nothing to write, and
      pending_actions: their actions, int32 `[B, chunk]`.
      first: frames of the chunk to come, known when traced, if it is a first one of another length;
        or None.
    """

    cache: Cache
    text: Any
    frame: jax.Array
    pending: jax.Array
    pending_frame: jax.Array
    pending_actions: jax.Array
    first: int | None = flax.struct.field(pytree_node=False, default=None)


class Chunk(flax.struct.PyTreeNode):
    """One generated chunk, and the input of its last network pass (for stage 3's replay).

    Attributes:
      x0: latents `[B, chunk, H, W, C]`.
      x, sigma: what the last pass saw, `[B, chunk, H, W, C]` and `[]`.
    """

    x0: jax.Array
    x: jax.Array
    sigma: jax.Array


class Rollout(flax.struct.PyTreeNode):
    """Generates video from a network.

    Attributes:
      network: the network; its pattern gives chunk, window and sink.
      sampler: noise levels and step.
      guidance: weight of classifier-free guidance; None is none and costs half (1 is none too, at
        the full cost).
      fused: whether the context pass rides on the next chunk's first step.
    """

    network: Network = flax.struct.field(pytree_node=False)
    sampler: Sampler
    guidance: float | None = None
    fused: bool = flax.struct.field(pytree_node=False, default=True)

    @property
    def passes(self) -> int:
        """Network passes a chunk."""
        return self.sampler.steps + (not self.fused)

    def start(
        self,
        params: Params,
        context: jax.Array,
        condition: Condition,
        slots: int | None = None,
        null: Condition | None = None,
    ) -> Stream:
        """Puts given frames into a new cache: none, one (image-to-video) or several (extension).

        Args:
          context: clean latents `[B, K, H, W, C]`; K may be 0.
          condition: actions of the given frames `[B, K]` and/or text.
          slots: frames that the cache holds; by default the pattern's window. For a clip that ends
            before, its length will do.
          null: text to guide away from, such as that of a negative prompt; see `Network.with_null`.

        Raises:
          ValueError: neither a window nor `slots` bounds the cache, or it is too short; or the
            given frames end within a chunk.
        """
        pattern, dit = self.network.pattern, self.network.dit
        slots = pattern.window if slots is None else slots
        if slots is None:
            raise ValueError("a pattern without a window needs the number of cache slots")
        batch, given = context.shape[:2]
        chunk = pattern.chunk
        if given and pattern.chunk_end(given - 1) != given:
            raise ValueError(
                f"{given} given frames end within a chunk, of frames up to "
                f"{pattern.chunk_end(given - 1)}; Rollout.after({given}) begins a chunk there"
            )
        first = None if given else pattern.first_chunk
        self._check_slots(slots, max(given, pattern.sink) + (first or chunk))
        text = self.encode_text(params, condition, null)
        cache = dit.cache(batch * (1 if self.guidance is None else 2), slots, pattern.sink)
        stream = Stream(
            cache=cache,
            text=text,
            frame=np.int32(0),  # known when traced, until the stream leaves the program
            first=first,
            **self._nothing_pending(batch, context.shape[2:]),
        )
        if not given:
            return stream
        frame, copy, actions = np.arange(given), np.full(given, CLEAN), condition.get("actions")
        _, key_value = self._evaluate(
            params, stream, context, jnp.zeros((batch, given)), frame, copy, actions
        )
        kept = frame[(frame < pattern.sink) | (frame >= given - (slots - pattern.sink))]
        key, value = (x[:, :, :, kept] for x in key_value)
        return stream.replace(
            cache=cache.write(jnp.asarray(kept, jnp.int32), key, value), frame=np.int32(given)
        )

    def encode_text(
        self, params: Params, condition: Condition, null: Condition | None = None
    ) -> Any:
        """The text's keys and values as a stream has them; arguments as those of `start`."""
        if self.guidance is not None:
            condition = self.network.with_null(condition, null)
        return self.network.text(params, condition)

    def next_chunk(self, params: Params, stream: Stream, *inputs) -> tuple[Stream, Chunk]:
        """`generate`, of the same arguments, and the context pass unless that will be fused."""
        stream, chunk = self.generate(params, stream, *inputs)
        if not self.defers_context_pass(stream):
            stream = self.context_pass(params, stream)
        return stream, chunk

    def defers_context_pass(self, stream: Stream) -> bool:
        """Whether what is pending will be written by the next chunk's first step."""
        return self.fused and stream.pending.shape[1] == self.network.pattern.chunk

    def generate(
        self,
        params: Params,
        stream: Stream,
        actions: jax.Array | None,
        noise: Noise,
        sigmas: jax.Array,
        last: jax.Array,
    ) -> tuple[Stream, Chunk]:
        """Generates the next chunk, which is pending then.

        Args:
          actions: int32 `[B, chunk]`, or None for a model without actions. A first chunk of
            another length takes `[B, stream.first]`.
          noise: `(frames, step) -> [B, chunk, H, W, C]`, the noise of the chunk's frames that a
            step starts from.
          sigmas: float32 `[steps + 1]`, the chunk's noise levels.
          last: int32 [], the step at which x0 is predicted: known only at run time, so that first
            and later chunks, and stage 3's random exits, share one program.
        """
        size = stream.first or self.network.pattern.chunk
        frame = stream.frame + jnp.arange(size, dtype=jnp.int32)
        batch = stream.pending.shape[0]
        level = lambda step: jnp.broadcast_to(sigmas[step], (batch, size))
        noisy = np.ones(size, int)

        def evaluate(x, step):
            return self._evaluate(params, stream, x, level(step), frame, noisy, actions)[0]

        x = noise(frame, 0)
        if self.fused and stream.first is None:
            cache, v = self._fused_step(params, stream, x, level(0), frame, actions)
            stream = stream.replace(cache=cache)
        else:
            v = evaluate(x, 0)

        def body(step, carry):
            x, v = carry
            fresh = noise(frame, step + 1)
            x = self.sampler.step(x, v, level(step), level(step + 1), fresh)
            return x, evaluate(x, step + 1)

        x, v = jax.lax.fori_loop(0, last, body, (x, v))
        x0 = flow.to_x0(x, v, level(last))

        if actions is None:
            actions = jnp.zeros((batch, size), jnp.int32)
        stream = stream.replace(
            frame=stream.frame + size,
            pending=x0,
            pending_frame=frame,
            pending_actions=actions,
            first=None,
        )
        return stream, Chunk(x0, x, sigmas[last])

    def context_pass(self, params: Params, stream: Stream) -> Stream:
        """The separate context pass: writes to the cache what is pending."""
        batch, size = stream.pending.shape[:2]
        _, key_value = self._evaluate(
            params,
            stream,
            stream.pending,
            jnp.zeros((batch, size)),
            stream.pending_frame,
            np.full(size, CLEAN),
            stream.pending_actions,
        )
        cache = stream.cache.write(stream.pending_frame, *key_value)
        return stream.replace(cache=cache, **self._nothing_pending(batch, stream.pending.shape[2:]))

    def _nothing_pending(self, batch: int, frame_shape: tuple[int, ...]) -> dict[str, jax.Array]:
        """The fields of a stream from which nothing is to be written."""
        chunk = self.network.pattern.chunk
        return {
            "pending": jnp.zeros((batch, chunk, *frame_shape)),
            "pending_frame": jnp.full(chunk, -1, jnp.int32),
            "pending_actions": jnp.zeros((batch, chunk), jnp.int32),
        }

    def unroll(
        self,
        params: Params,
        stream: Stream,
        condition: Condition,
        noise: Noise,
        sigmas: jax.Array,
        last: jax.Array,
    ) -> tuple[Stream, Chunk]:
        """Generates chunks in one scan, after a first one if that is of another length.

        Args:
          condition: actions of the frames to generate, int32 `[B, N]`.
          noise: see `generate`.
          sigmas: float32 `[chunks, steps + 1]`, each chunk's noise levels.
          last: int32 `[chunks]`, each chunk's last step; there are as many chunks as these.

        Returns:
          The stream, and a `Chunk` whose x0 and x are `[B, N, H, W, C]` and whose sigma is `[N]`.

        Raises:
          ValueError: the cache is too short for so many frames or, without a window, of a stream
            that comes from another program nobody knows whether it is.
        """
        params = self.network.for_inference(params)
        if stream.first is not None:
            return self._unroll_first(params, stream, condition, noise, sigmas, last)
        actions = condition.get("actions")
        size = self.network.pattern.chunk
        is_known = isinstance(stream.frame, np.integer)
        if self.network.pattern.window is None and not is_known:
            raise ValueError(
                "without a window, a clip is unrolled in the program that starts its stream, so "
                "that its length is known; give the pattern a window"
            )
        before = stream.frame if is_known else 0
        self._check_slots(stream.cache.slots, before + len(last) * size)
        if actions is not None:
            actions = einops.rearrange(actions, "b (n c) -> n b c", c=size)

        def body(stream, inputs):
            actions, sigmas, last = inputs
            return self.next_chunk(params, stream, actions, noise, sigmas, last)

        stream, out = jax.lax.scan(body, stream, (actions, sigmas, last))
        join = lambda x: einops.rearrange(x, "n b c ... -> b (n c) ...")
        return stream, Chunk(join(out.x0), join(out.x), jnp.repeat(out.sigma, size))

    def _unroll_first(self, params, stream, condition, noise, sigmas, last):
        """`unroll` from a first chunk of another length: that one, and then the others."""
        first = stream.first
        actions = of_frames(condition, np.s_[:first]).get("actions")
        others = of_frames(condition, np.s_[first:])
        sigmas = jnp.asarray(sigmas)
        stream, one = self.next_chunk(params, stream, actions, noise, sigmas[0], last[0])
        stream, out = self.unroll(params, stream, others, noise, sigmas[1:], last[1:])
        join = lambda a, b: jnp.concatenate([a, b], 1)
        sigma = jnp.concatenate([jnp.broadcast_to(one.sigma, first), out.sigma])
        return stream, Chunk(join(one.x0, out.x0), join(one.x, out.x), sigma)

    @functools.partial(jax.jit, static_argnames="frames")
    def clip(
        self,
        params: Params,
        context: jax.Array,
        condition: Condition,
        rng: jax.Array,
        frames: int,
    ) -> jax.Array:
        """Continues given frames.

        Args:
          context: the frames to start from, uint8 `[B, K, H, W, 3]` or float latents `[B, K, H, W,
            C]`; K may be 0.
          condition: `actions` int32 `[B, K + N]`, the given frames' own ones first; and/or text.
          rng: a key.
          frames: N, how many to generate.

        Returns:
          `[B, N, H, W, C]`, bytes or latents as `context` is.
        """
        given = context.shape[1]
        total = given + frames
        rollout = self.after(given)
        ends = chunk_ends(rollout.network.pattern, given, total)
        end = int(ends.max(initial=total))
        if "actions" in condition:
            actions = jnp.pad(condition["actions"], ((0, 0), (0, end - total)), "edge")
            condition = condition | {"actions": actions}
        first, later = (of_frames(condition, part) for part in np.s_[:given, given:])

        slots = self.network.pattern.window or end
        stream = rollout.start(params, codec.encode(context), first, slots)
        noise = gaussian_noise(rng, stream.pending[:, 0].shape)
        sigmas, last = self.sampler.of_chunks(len(ends))
        _, out = rollout.unroll(params, stream, later, noise, sigmas, last)
        return codec.decode(out.x0[:, :frames], context.dtype)

    def after(self, given: int) -> "Rollout":
        """The same rollout from the end of the given frames on; see `Network.after`."""
        return self.replace(network=self.network.after(given))

    def _check_slots(self, slots: int, frames: int) -> None:
        """Raises ValueError if a cache cannot hold what is to be seen of a clip of `frames`."""
        window = self.network.pattern.window
        needed = frames if window is None else min(frames, window)
        if slots < needed:
            raise ValueError(
                f"the cache has {slots} slots; a clip of {frames} frames needs {needed}"
            )

    def _evaluate(self, params, stream, x, sigma, frame, copy, actions):
        """Velocity `[B, ...]` and new keys and values of entries, guided on pairs."""
        if self.guidance is not None:
            x, sigma = twice((x, sigma))
            if actions is not None:
                actions = self.network.with_null({"actions": actions})["actions"]
        if not self.network.dit.num_actions:
            actions = None
        v, key_value = self.network.apply(
            params, x, sigma, frame, copy, actions, stream.text, stream.cache
        )
        if self.guidance is not None:
            v = guide_pairs(v, self.guidance)
        return v, key_value

    def _fused_step(self, params, stream, x, sigma, frame, actions):
        """One pass over `[clean pending | noisy x]`: the written cache and the velocity at x."""
        size = x.shape[1]
        both_actions = None
        if actions is not None:
            both_actions = jnp.concatenate([stream.pending_actions, actions], 1)
        v, key_value = self._evaluate(
            params,
            stream,
            jnp.concatenate([stream.pending, x], 1),
            jnp.concatenate([jnp.zeros_like(sigma), sigma], 1),
            jnp.concatenate([stream.pending_frame, frame]),
            np.repeat([CLEAN, 1], size),
            both_actions,
        )
        key, value = (x[:, :, :, :size] for x in key_value)
        return stream.cache.write(stream.pending_frame, key, value), v[:, size:]


def for_stage(
    network: Network,
    config: ml_collections.ConfigDict,
    steps: int | None = None,
    first_steps: int | None = None,
    *,
    guidance: float | None = None,
    fused: bool = True,
) -> Rollout:
    """The rollout that suits a stage's model: Euler for teachers, consistency for students.

    Args:
      network: the model's.
      config: of the stage.
      steps: of the sampler, at least 1; None is `TEACHER_STEPS` for a teacher, and for a student
        see `student_sampler`.
      first_steps: of a student's first chunk; see there.
      guidance: weight for a teacher, of whose config it is by default; in a student it is
        distilled.
      fused: see the module's docstring.

    Raises:
      UserError: the stage's model cannot stream, or not like this.
    """
    network = network.without_unrolling()
    for name, value in {"steps": steps, "first_steps": first_steps}.items():
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    if network.pattern.chunk is None:
        raise UserError("a bidirectional model cannot stream; take one of stage 1, 2 or 3")
    if network.pattern.window is None:
        raise UserError(
            "the model's pattern has no window, which streaming in a cache needs; give it one "
            "(Network.attending, or --window)"
        )
    if config.stage != "ar_diffusion":
        if guidance is not None:
            raise UserError("in a student guidance is distilled; only a teacher takes another")
        return Rollout(network, student_sampler(config, steps, first_steps), fused=fused)
    if first_steps is not None:
        raise UserError("a teacher takes as many steps for the first chunk as for the others")
    weight = config.guidance if guidance is None else guidance
    sampler = euler(steps or TEACHER_STEPS, config.shift)
    return Rollout(network, sampler, None if weight == 1.0 else weight, fused)


def chunk_ends(pattern: Pattern, given: int, frames: int) -> np.ndarray:
    """Where the chunks of the frames `given` .. `frames` - 1 end: the first frame after each."""
    return np.unique(pattern.chunk_end(np.arange(given, frames)))


def gaussian_noise(rng: jax.Array, shape: tuple[int, ...]) -> Noise:
    """Fresh noise for every (frame, step), a function of the key alone.

    Args:
      rng: a key.
      shape: of one frame, `[..., H, W, C]`. The axis of the frames comes before the last three.
    """

    def noise(frames, step):
        key = lambda frame: jax.random.fold_in(jax.random.fold_in(rng, frame), step)
        return jax.vmap(lambda frame: jax.random.normal(key(frame), shape), out_axes=-4)(frames)

    return noise


@functools.partial(jax.jit, static_argnames=("network", "frames"))
def bidirectional_clip(
    network: Network,
    params: Params,
    context: jax.Array,
    condition: Condition,
    rng: jax.Array,
    frames: int,
    sampler: Sampler,
) -> jax.Array:
    """Samples all frames of a clip together from a bidirectional model, given the first ones.

    The given frames are held clean, at sigma 0, as in stage 0's training. Shapes as `Rollout.clip`.
    """
    batch, given = context.shape[:2]
    total = given + frames
    velocity = network.without_unrolling().bidirectional(params, condition)
    held = jnp.arange(total) < given
    clean = jnp.pad(codec.encode(context), ((0, 0), (0, total - given)) + ((0, 0),) * 3)
    hold = lambda x: jnp.where(held[None, :, None, None, None], clean, x)
    sigmas = jnp.asarray(sampler.sigmas)[1]
    level = lambda step: jnp.where(held, 0.0, sigmas[step])[None].repeat(batch, 0)

    def body(step, x):
        fresh = jax.random.normal(jax.random.fold_in(rng, step + 1), x.shape)
        v = velocity(x, level(step))
        return hold(sampler.step(x, v, level(step), level(step + 1), fresh))

    x = hold(jax.random.normal(jax.random.fold_in(rng, 0), clean.shape))
    x = jax.lax.fori_loop(0, jnp.asarray(sampler.last)[1] + 1, body, x)
    return codec.decode(x[:, given:], context.dtype)
