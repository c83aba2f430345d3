"""A DiT with its attention pattern, and the ways in which it is evaluated.

`bidirectional`, `teacher_forced` and `replay` return a velocity field `(x, sigma) -> v` with
everything else bound, which is all that the losses know of a network. Rollouts call `apply`, which
gives the keys and values for their cache too. A *condition* is a dict with `actions` int32 `[B, F]`
and/or `text` float `[B, length, text_dim]`, according to the model.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from cfpp import flow
from cfpp.attention.cache import Cache
from cfpp.attention.pattern import Pattern, teacher_forced_entries
from cfpp.models.dit import DiT
from cfpp.parallel import mesh

Params = Any
Condition = dict[str, jax.Array]


def condition_of(batch: dict[str, jax.Array]) -> Condition:
    """What a batch, or held-out clips, have of a condition, as it is."""
    return {name: batch[name] for name in ("actions", "text") if name in batch}


def of_frames(condition: Condition, frames: Any) -> Condition:
    """The condition of some of a clip's frames, by index or slice; a text is that of all."""
    return {name: x[:, frames] if name == "actions" else x for name, x in condition.items()}


def paired(first: Any, second: Any) -> Any:
    """The clips of two batches in turn, so that a device that has a clip has both of it.

    Guidance evaluates the network once on such pairs, (conditional, unconditional).
    """
    join = lambda a, b: jnp.stack([a, b], 1).reshape(2 * len(a), *a.shape[1:])
    return jax.tree.map(join, first, second)


def twice(tree: Any) -> Any:
    """Every clip as both of a pair."""
    return paired(tree, tree)


def guide_pairs(v: jax.Array, weight: float) -> jax.Array:
    """The guided velocity `[B, ...]` from one of pairs, `[2 B, ...]`."""
    v = v.reshape(-1, 2, *v.shape[1:])
    return flow.guide(v[:, 0], v[:, 1], weight)


def guided(velocity: flow.Velocity, weight: float) -> flow.Velocity:
    """A guided velocity field from one over pairs."""
    return lambda x, sigma: guide_pairs(velocity(twice(x), twice(sigma)), weight)


def cast_products(params: Params, dtype: str) -> Params:
    """Parameters with the matrices of the blocks in another dtype.

    Nearly all parameters are such. Their products take them in `dit.dtype`, so in that the output
    stays the same; much of the rest is used in float32.
    """

    def cast(path, x):
        names = [getattr(key, "key", None) for key in path]  # a box adds a key of another kind
        return x.astype(dtype) if names[0] == "blocks" and "kernel" in names else x

    return jax.tree_util.tree_map_with_path(cast, params)


FIELDS = tuple(
    f"model.{field.name}"
    for field in dataclasses.fields(DiT)
    if field.default is field.default_factory is dataclasses.MISSING
)
"""What a stored configuration must have for `Network.create`, besides `pattern`."""


@dataclasses.dataclass(frozen=True)
class Network:
    """The network of a job: a DiT and the pattern by which its frames attend to one another."""

    dit: DiT
    pattern: Pattern

    @classmethod
    def create(cls, model: ml_collections.ConfigDict, pattern: ml_collections.ConfigDict):
        """Builds the network that `config.model` and `config.pattern` describe.

        Raises:
          ValueError: it cannot be built.
        """
        parts = []
        for kind, group, fields in ((DiT, "model", model), (Pattern, "pattern", pattern)):
            try:
                parts.append(kind(**fields))
            except (TypeError, ValueError) as error:  # TypeError: a field is missing, or unknown
                raise ValueError(f"config.{group}: {error}") from error
        network = cls(*parts)
        network.dit.check()
        return network

    def after(self, given: int) -> "Network":
        """The same network, for what follows the first `given` frames; see `Pattern.after`."""
        return dataclasses.replace(self, pattern=self.pattern.after(given))

    def clone(self, **fields: Any) -> "Network":
        """The same network with other attributes of its DiT."""
        return dataclasses.replace(self, dit=self.dit.clone(**fields))

    def attending(self, **fields: Any) -> "Network":
        """The same network with other attributes of its pattern.

        Raises:
          ValueError: they do not fit one another; see `Pattern`.
        """
        return dataclasses.replace(self, pattern=dataclasses.replace(self.pattern, **fields))

    def without_unrolling(self) -> "Network":
        """The same network with its loop over blocks not unrolled: for programs without gradients.

        These gain nothing from unrolling, and compile several times faster.
        """
        return self.clone(unroll=1)

    def init(self, rng: jax.Array) -> Params:
        """Random parameters, boxed with their logical axis names (`flax.linen.meta`)."""
        dit = self.dit
        x = jnp.zeros((1, 1, dit.height, dit.width, dit.channels))
        action = jnp.zeros((1, 1), jnp.int32)
        text = jnp.zeros((1, 1, dit.text_dim))

        def run(module):
            text_key_value = module.encode_text(text) if dit.text_dim else None
            return module(
                x, jnp.zeros((1, 1)), np.zeros(1, int), np.ones(1, int), Pattern(),
                action, text_key_value,
            )  # fmt: skip

        return dit.init(rng, method=run)["params"]

    def shapes(self) -> Params:
        """What `init` returns, as shapes."""
        return jax.eval_shape(self.init, jax.random.key(0))

    @functools.partial(jax.jit, static_argnums=0)
    def for_inference(self, params: Params) -> Params:
        """Parameters as every pass uses them, for many passes without a gradient.

        Matrices of the blocks are in `dit.dtype`; on a mesh all are gathered, so that only its
        tensor axis still divides them. Each pass would do both anew, layer by layer; the output
        stays the same. Until the given ones are let go there is memory for both.
        """
        params = cast_products(params, self.dit.dtype)
        if mesh.ambient() is None:
            return params
        place = lambda array, box: mesh.constrain(array, *box.names)
        return jax.tree.map(place, params, self.shapes())

    def null(self, condition: Condition) -> Condition:
        """The condition that stands for none: the extra action, text embeddings of zero."""
        nothing = {"actions": self.dit.num_actions, "text": 0}
        return {name: jnp.full_like(value, nothing[name]) for name, value in condition.items()}

    def drop(self, rng: jax.Array, condition: Condition, rate: float) -> Condition:
        """Replaces a clip's condition by none, with probability `rate`: training for guidance."""
        if not condition or not rate:
            return condition
        clips = len(next(iter(condition.values())))
        dropped = jax.random.bernoulli(rng, rate, (clips,))
        choose = lambda none, given: jnp.where(
            jnp.expand_dims(dropped, range(1, given.ndim)), none, given
        )
        return jax.tree.map(choose, self.null(condition), condition)

    def with_null(self, condition: Condition, null: Condition | None = None) -> Condition:
        """The condition and its absence in pairs, for `guided`.

        Args:
          null: what takes the place of `Network.null`, all of it or a part: Wan's pipelines guide
            away from the text of a negative prompt, which has the shape of `condition["text"]`.
        """
        return paired(condition, self.null(condition) | (null or {}))

    def text(self, params: Params, condition: Condition) -> Any:
        """The text's keys and values, computed once a clip; None for a model without text."""
        if not self.dit.text_dim:
            return None
        return self.dit.apply({"params": params}, condition["text"], method=DiT.encode_text)

    def apply(self, params, x, sigma, frame, copy, actions, text, cache=None, pattern=None):
        """The DiT on given entries; see `DiT.__call__`."""
        return self.dit.apply(
            {"params": params}, x, sigma, frame, copy, pattern or self.pattern, actions, text, cache
        )

    def bidirectional(
        self,
        params: Params,
        condition: Condition,
        guidance: float = 1.0,
        null: Condition | None = None,
    ) -> flow.Velocity:
        """All frames see all frames: x `[B, F, H, W, C]`, sigma `[B, F]`; null as `with_null`'s."""
        if guidance != 1.0:
            return guided(self.bidirectional(params, self.with_null(condition, null)), guidance)
        text = self.text(params, condition)

        def velocity(x, sigma):
            frames = x.shape[1]
            return self.apply(
                params, x, sigma, np.arange(frames), np.ones(frames, int),
                condition.get("actions"), text, pattern=Pattern(chunk=None),
            )[0]  # fmt: skip

        return velocity

    def teacher_forced(
        self,
        params: Params,
        clean: jax.Array,
        condition: Condition,
        guidance: float = 1.0,
        null: Condition | None = None,
    ) -> flow.Velocity:
        """Noisy frames given the clean frames before them, all at once.

        Args:
          clean: latents of whole clips, `[B, F, H, W, C]`.
          guidance, null: weight of guidance, and what it leads away from; see `with_null`.

        Returns:
          A velocity field over x `[B, draws * F, H, W, C]`, sigma `[B, draws * F]`: any number of
          noisy draws of the clip, one after another, that share the one clean pass.
        """
        if guidance != 1.0:
            both = self.teacher_forced(params, twice(clean), self.with_null(condition, null))
            return guided(both, guidance)
        text = self.text(params, condition)
        frames = clean.shape[1]

        def velocity(x, sigma):
            draws = x.shape[1] // frames
            frame, copy = teacher_forced_entries(frames, draws)
            actions = condition.get("actions")
            if actions is not None:
                actions = jnp.tile(actions, (1, 1 + draws))
            v, _ = self.apply(
                params,
                jnp.concatenate([clean, x], 1),
                jnp.concatenate([jnp.zeros(clean.shape[:2]), sigma], 1),
                frame, copy, actions, text,
            )  # fmt: skip
            return v[:, frames:]

        return velocity

    def replay(self, params: Params, cache: Cache, condition: Condition) -> flow.Velocity:
        """Noisy frames against a cache that holds a whole clip, frame i in slot i.

        Returns:
          A velocity field over the clip's last frames, as many as it is given.
        """
        text = self.text(params, condition)
        cache = cache.replace(frame=np.arange(cache.slots))  # what it holds, known when traced

        def velocity(x, sigma):
            frames = x.shape[1]
            frame = np.arange(cache.slots - frames, cache.slots)
            copy, actions = np.ones(frames, int), of_frames(condition, frame).get("actions")
            v, _ = self.apply(params, x, sigma, frame, copy, actions, text, cache)
            return v

        return velocity
