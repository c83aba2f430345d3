"""The video diffusion transformer: Wan 2.1's architecture, one module for every attention pattern.

Whether it runs bidirectionally, teacher-forced or against a cache is decided by its inputs: the
frame number and copy of each entry, an attention `Pattern`, and an optional `Cache`. Per block:

    x += gate1 * self_attention(norm(x) * (1 + scale1) + shift1)      q, k: RMSNorm, 3-axis rotary
    x += cross_attention(norm(x), text)                               where the model has a text
    x += gate2 * mlp(norm(x) * (1 + scale2) + shift2)

Shift, scale and gate come from one time embedding an entry, to which the entry's action is added.

Dimension letters: B batch, E entries (frames of the sequence), T tokens a frame, N heads,
D head_dim, L layers, S cache slots, C channels.
"""

import functools
from collections.abc import Callable

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cfpp import flow
from cfpp.attention import dispatch, schedule
from cfpp.attention.cache import LARGEST_VALUES, Cache
from cfpp.attention.pattern import CLEAN, Pattern
from cfpp.parallel import context, mesh

HISTORY_GRADIENTS = ("none", "straight_through")

REMAT = ("none", "full", "save_attention", "offload")

ACTIVATIONS = ("batch", None, "tokens", None)  # logical axes of [B, E, T, dim]


def sinusoid(t: jax.Array, width: int) -> jax.Array:
    """Wan's time features: `[cos, sin]` of t at geometric frequencies, float32 `[..., width]`."""
    frequency = 10000.0 ** (-np.arange(width // 2) / (width // 2))
    angle = t[..., None].astype(jnp.float32) * frequency.astype(np.float32)
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)


def phase(position: jax.Array, frequency: np.ndarray) -> jax.Array:
    """The angles position x frequency, but for whole turns, at any length of a stream.

    In float32 the product is off by 0.03 after a million frames. So the position is taken digit by
    digit, to the base 1024, of which only the last is multiplied as it is.

    Args:
      position: int32 `[n]`.
      frequency: float64 `[m]`, radians a position.

    Returns:
      Radians, float32 `[n, m]`, to within 0.002.
    """
    position = jnp.asarray(position, jnp.int32)[:, None]
    digits = position & 1023, (position >> 10) & 1023, position >> 20
    turn = lambda power: np.mod(1024.0**power * frequency, 2 * np.pi) if power else frequency
    return sum(
        digit.astype(jnp.float32) * turn(power).astype(np.float32)
        for power, digit in enumerate(digits)
    )


def rotary_angles(
    frame: jax.Array, rows: int, columns: int, head_dim: int, base: float
) -> jax.Array:
    """Rotation angles over (frame, row, column), float32 `[entries, rows * columns, head_dim / 2]`.

    The pairs of a head are split d - 4 (d // 6), 2 (d // 6), 2 (d // 6) over the three axes.
    """
    side = 2 * (head_dim // 6)
    widths = (head_dim - 2 * side, side, side)
    per_axis = []
    for position, width in zip((frame, np.arange(rows), np.arange(columns)), widths, strict=True):
        per_axis.append(phase(position, base ** (-np.arange(0, width, 2) / max(width, 1))))
    shape = (len(frame), rows, columns)
    f, r, c = per_axis
    angles = (
        jnp.broadcast_to(f[:, None, None], (*shape, f.shape[-1])),
        jnp.broadcast_to(r[None, :, None], (*shape, r.shape[-1])),
        jnp.broadcast_to(c[None, None, :], (*shape, c.shape[-1])),
    )
    return jnp.concatenate(angles, -1).reshape(len(frame), rows * columns, head_dim // 2)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotates neighbouring pairs of `x` `[B, N, E, T, D]` by `angles` `[E, T, D / 2]`."""
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return rotated.reshape(x.shape).astype(x.dtype)


def _product(axes, x, kernel, dimensions, **kwargs):
    """A linear layer's product, for `nn.Dense`, which has cast the kernel: half of the bytes."""
    if mesh.ambient() is not None:
        return jax.lax.dot_general(x, mesh.gather(kernel, axes), dimensions, **kwargs)
    # Over one axis of tokens, as nothing keeps them apart: the weights' gradient is then one plain
    # matrix product, which a CPU does much faster.
    flat = x.reshape(-1, x.shape[-1])
    return (flat @ kernel).reshape(*x.shape[:-1], -1)


def dense(features: int, axes: tuple[str, str], dtype, name: str, init=None) -> nn.Dense:
    """A linear layer whose parameters carry logical axis names."""
    init = init or nn.initializers.lecun_normal()
    return nn.Dense(
        features,
        dtype=dtype,
        dot_general=functools.partial(_product, axes),
        kernel_init=nn.with_logical_partitioning(init, axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[1:]),
        name=name,
    )


def rms_norm(dtype, name: str) -> nn.RMSNorm:
    """RMSNorm over the whole width of q or k, before the split into heads."""
    scale_init = nn.with_logical_partitioning(nn.initializers.ones, ("heads",))
    return nn.RMSNorm(epsilon=1e-6, dtype=dtype, scale_init=scale_init, name=name)


def modulated_norm(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """Layer norm without parameters in float32, then an affine map for each entry.

    Args:
      x: `[B, E, T, dim]`.
      shift, scale: `[B, E, dim]`.
    """
    normed = jax.nn.standardize(x.astype(jnp.float32), epsilon=1e-6)
    return (normed * (1 + scale[:, :, None]) + shift[:, :, None]).astype(x.dtype)


def rematerialised(block: type[nn.Module], policy: str) -> type[nn.Module]:
    """A block that keeps for its backward pass what `policy` names, and computes the rest anew.

    Args:
      block: the module.
      policy: 'none' keeps everything; 'full' the block's input; 'save_attention' besides it the
        output of attention, its costliest part; 'offload' that too, in the memory of the host.
    """
    if policy == "none":
        return block
    known = jax.checkpoint_policies
    policies = {
        "full": known.nothing_saveable,
        "save_attention": known.save_only_these_names(schedule.RESIDUAL),
        "offload": known.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[schedule.RESIDUAL],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }
    return nn.remat(block, prevent_cse=False, policy=policies[policy])


class TextKeyValue(nn.Module):
    """One layer's keys and values of the text, computed once a clip and kept."""

    dim: int
    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, carry: None, text: jax.Array):
        """Maps text tokens `[B, length, dim]` to key and value `[B, length, N, D]`."""
        k = rms_norm(self.dtype, "norm_k")(
            dense(self.dim, ("embed", "heads"), self.dtype, "k")(text)
        )
        v = dense(self.dim, ("embed", "heads"), self.dtype, "v")(text)
        split = lambda y: einops.rearrange(y, "b l (n d) -> b l n d", n=self.heads)
        place = lambda y: mesh.constrain(split(y), "batch", None, "heads", None)
        return carry, (place(k), place(v))


def _pass_through(cached: jax.Array, fresh: jax.Array) -> jax.Array:
    """Cached keys or values, with the gradient going to the same frames' fresh ones.

    This is what overwriting a cache in place computes in the public PyTorch code: the gradient with
    respect to a clean frame's key flows on into its noisy key.

    Args:
      cached: `[B, N, S, T, D]`.
      fresh: `[B, N, E, T, D]`, of the cache's last E frames, in its order.
    """
    through = fresh - jax.lax.stop_gradient(fresh)  # zero, with a gradient
    given = cached.shape[2] - fresh.shape[2]
    return cached + jnp.pad(through, ((0, 0), (0, 0), (given, 0), (0, 0), (0, 0)))


class Block(nn.Module):
    """One transformer block; see the module's docstring."""

    dim: int
    ffn_dim: int
    heads: int
    gate_init: float
    attention: str
    history_gradient: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, layer_inputs, modulation, angles, own, history):
        """Runs the block.

        Args:
          x: `[B, E, T, dim]`.
          layer_inputs: (layer, text): the block's number, int32 [], and its text key and value
            `[B, length, N, D]` or None.
          modulation: float32 `[B, E, 6, dim]`, shared by all blocks.
          angles: `[E, T, D / 2]`.
          own: which entries see which, a mask `[E, E]`.
          history: which cached frames they see, a mask `[E, S]`, and the cached keys and values of
            all blocks, `[L, B, N, S, T, D]`, plain or `Quantised`; None without a cache.

        Returns:
          The new x, and this block's key and value of all entries `[B, N, E, T, D]`.
        """
        layer, text = layer_inputs
        offset = self.param(
            "modulation",
            nn.with_logical_partitioning(self._init_modulation, (None, "embed")),
            (6, self.dim),
        )
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.moveaxis(modulation + offset, 2, 0)

        h = modulated_norm(x, shift1, scale1)
        h, key_value = self._self_attention(h, angles, own, history, layer)
        x = x + (h * gate1[:, :, None]).astype(x.dtype)
        if text is not None:
            x = x + self._cross_attention(x, text)
        h = modulated_norm(x, shift2, scale2)
        h = dense(self.ffn_dim, ("embed", "mlp"), self.dtype, "mlp_in")(h)
        h = mesh.constrain(h, "batch", None, "tokens", "mlp")
        h = dense(self.dim, ("mlp", "embed"), self.dtype, "mlp_out")(nn.gelu(h, approximate=True))
        x = x + (h * gate2[:, :, None]).astype(x.dtype)
        return mesh.constrain(x, *ACTIVATIONS), key_value

    def _init_modulation(self, rng, shape, dtype=jnp.float32):
        noise = jax.random.normal(rng, shape, dtype) / np.sqrt(self.dim)
        return noise.at[np.array([2, 5])].add(self.gate_init)

    def _self_attention(self, h, angles, own, history, layer):
        project = lambda name: dense(self.dim, ("embed", "heads"), self.dtype, name)(h)
        split = lambda y: einops.rearrange(y, "b e t (n d) -> b n e t d", n=self.heads)
        q = rotate(split(rms_norm(self.dtype, "norm_q")(project("q"))), angles)
        k = rotate(split(rms_norm(self.dtype, "norm_k")(project("k"))), angles)
        q, k, v = context.to_heads(q, k, split(project("v")))
        parts = [(k, v, own, None)]
        if history is not None:
            mask, *cached = history
            if self.history_gradient == "straight_through":
                cached = [_pass_through(x[layer], y) for x, y in zip(cached, (k, v), strict=True)]
                layer = None
            parts.append((*cached, mask, layer))
        out = context.to_tokens(dispatch.attend(self.attention, q, parts))
        out = einops.rearrange(out, "b n e t d -> b e t (n d)")
        return dense(self.dim, ("heads", "embed"), self.dtype, "o")(out), (k, v)

    def _cross_attention(self, x, text):
        h = nn.LayerNorm(
            epsilon=1e-6,
            dtype=jnp.float32,
            scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("embed",)),
            bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("embed",)),
            name="cross_norm",
        )(x).astype(self.dtype)
        q = rms_norm(self.dtype, "cross_norm_q")(
            dense(self.dim, ("embed", "heads"), self.dtype, "cross_q")(h)
        )
        q = einops.rearrange(q, "b e t (n d) -> b e t n d", n=self.heads)
        q = mesh.constrain(q, "batch", None, "tokens", "heads", None)
        # Over entries one by one: merging them with tokens would undo the tokens' layout.
        out = jax.vmap(lambda q: jax.nn.dot_product_attention(q, *text), 1, 1)(q)
        out = einops.rearrange(out, "b e t n d -> b e t (n d)")
        return dense(self.dim, ("heads", "embed"), self.dtype, "cross_o")(out)


class DiT(nn.Module):
    """The network. Its attributes are the fields of `config.model`, but for `history_gradient`.

    Attributes:
      channels: channels of a latent frame.
      height, width: size of a latent frame.
      patch: side of a square patch of a frame; tokens a frame = height * width / patch**2.
      dim, ffn_dim, heads, layers: sizes of the transformer.
      frequency_dim: width of the time sinusoid.
      num_actions: size of the action set; 0 is a model without actions.
      text_dim: width of the text embeddings; 0 is a model without text.
      rotary_base: base of the rotary frequencies.
      gate_init: where the gates start, apart from noise (Wan: 0).
      prediction: how the raw output is read, 'velocity' or 'x0'.
      dtype: dtype of activations and matrix products; parameters are float32.
      remat: what the backward pass computes anew, one of `REMAT`.
      unroll: blocks in one turn of the loop over blocks: more runs faster on a CPU, one compiles
        fastest. With any `remat` but 'none' it is one.
      attention: the implementation, one of `attention.dispatch.IMPLEMENTATIONS` or 'auto'.
      history_gradient: what the entries' own keys get of the cached ones' gradient, 'none' or
        'straight_through'.
      cache_dtype: what a rollout's cache holds, 'int8' or 'float8_e4m3fn' (see `attention.cache`);
        '' is `dtype`.
    """

    channels: int
    height: int
    width: int
    patch: int
    dim: int
    ffn_dim: int
    heads: int
    layers: int
    frequency_dim: int = 256
    num_actions: int = 0
    text_dim: int = 0
    rotary_base: float = 10000.0
    gate_init: float = 0.0
    prediction: str = "velocity"
    dtype: str = "float32"
    remat: str = "none"
    unroll: int = 1
    attention: str = "auto"
    history_gradient: str = "none"
    cache_dtype: str = ""

    @property
    def tokens(self) -> int:
        """Tokens of one frame."""
        return (self.height // self.patch) * (self.width // self.patch)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.heads

    def cache(self, batch: int, slots: int, sink: int = 0) -> Cache:
        """An empty cache for `slots` frames of `batch` clips."""
        shape = (self.layers, batch, self.heads, slots, self.tokens, self.head_dim)
        cache = Cache.empty(shape, jnp.dtype(self.cache_dtype or self.dtype), sink)
        key, value = jax.tree.map(context.constrain_cache, (cache.key, cache.value))
        return cache.replace(key=key, value=value)

    def check(self) -> None:
        """Raises ValueError if an attribute is out of range, or sizes do not fit one another."""
        choices = {
            "prediction": ("velocity", "x0"),
            "remat": REMAT,
            "attention": ("auto", *dispatch.IMPLEMENTATIONS),
            "history_gradient": HISTORY_GRADIENTS,
            "dtype": ("float32", "bfloat16", "float16"),
            "cache_dtype": ("", *LARGEST_VALUES),
        }
        for field, known in choices.items():
            if getattr(self, field) not in known:
                raise ValueError(
                    f"model.{field} must be one of {', '.join(x or repr(x) for x in known)}, "
                    f"got {getattr(self, field)!r}"
                )
        frame, block = ("channels", "height", "width", "patch"), ("dim", "ffn_dim", "heads")
        least = dict.fromkeys((*frame, *block, "layers", "unroll"), 1)
        least |= {"frequency_dim": 2, "num_actions": 0, "text_dim": 0}
        for field, minimum in least.items():
            value = getattr(self, field)
            if not isinstance(value, int) or value < minimum:
                raise ValueError(f"model.{field} is {value!r}; it must be at least {minimum}")
        if self.height % self.patch or self.width % self.patch:
            raise ValueError(
                f"model.patch is {self.patch}; a frame of {self.height} x {self.width} does not "
                f"divide into patches of {self.patch} x {self.patch}"
            )
        if self.dim % self.heads or self.head_dim % 2:
            raise ValueError(
                f"model.heads is {self.heads}; dim {self.dim} does not split into {self.heads} "
                "heads of even width"
            )

    def setup(self):
        """Makes the layers."""
        dtype = jnp.dtype(self.dtype)
        self.patch_in = dense(self.dim, ("patch", "embed"), dtype, "patch_in")
        self.time_in = dense(self.dim, ("frequency", "embed"), jnp.float32, "time_in")
        self.time_out = dense(self.dim, ("embed", "embed_out"), jnp.float32, "time_out")
        self.time_modulation = dense(
            6 * self.dim, ("embed", "embed_out"), jnp.float32, "time_modulation"
        )
        if self.num_actions:
            self.action = nn.Embed(
                self.num_actions + 1,  # the last one is "no action", for guidance
                self.dim,
                # Small: it is added to the time's, which it would drown (docs/experiments.md).
                embedding_init=nn.with_logical_partitioning(
                    nn.initializers.normal(0.02), ("actions", None)
                ),
            )
        if self.text_dim:
            self.text_in = dense(self.dim, ("text", "embed"), dtype, "text_in")
            self.text_out = dense(self.dim, ("embed", "embed_out"), dtype, "text_out")
            self.text_key_value = self._stack(TextKeyValue, in_axes=nn.broadcast)(
                self.dim, self.heads, dtype
            )
        block = rematerialised(Block, self.remat)
        self.blocks = self._stack(block, in_axes=(0, *[nn.broadcast] * 4))(
            self.dim,
            self.ffn_dim,
            self.heads,
            self.gate_init,
            self.attention,
            self.history_gradient,
            dtype,
        )
        self.head_modulation = self.param(
            "head_modulation",
            nn.with_logical_partitioning(
                nn.initializers.normal(1 / np.sqrt(self.dim)), (None, "embed")
            ),
            (2, self.dim),
        )
        self.head = dense(
            self.channels * self.patch**2, ("embed", "patch"), dtype, "head", nn.initializers.zeros
        )

    def _stack(self, layer: type[nn.Module], in_axes) -> Callable:
        return nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=in_axes,
            length=self.layers,
            # Without the loop XLA would see that what is rematerialised is there, and keep it.
            unroll=self.unroll if self.remat == "none" else 1,
            # The check traces a layer once more. In `init` it stays: without it the random
            # parameters would be others.
            check_constancy_invariants=self.is_initializing(),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )

    def encode_text(self, text: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of text embeddings `[B, length, text_dim]`: `[L, B, length, N, D]`."""
        h = self.text_out(nn.gelu(self.text_in(text), approximate=True))
        return self.text_key_value(None, h)[1]

    def embed_time(self, sigma: jax.Array) -> jax.Array:
        """The embedding of noise levels `[...]`, without actions: float32 `[..., dim]`."""
        features = sinusoid(1000.0 * sigma, self.frequency_dim)
        return self.time_out(nn.silu(self.time_in(features)))

    def __call__(
        self,
        x: jax.Array,
        sigma: jax.Array,
        frame: jax.Array,
        copy: np.ndarray,
        pattern: Pattern,
        action: jax.Array | None = None,
        text: tuple[jax.Array, jax.Array] | None = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Predicts the velocity of every entry.

        Args:
          x: float `[B, E, height, width, C]`.
          sigma: noise level of each entry, `[B, E]`, 0 for clean ones.
          frame, copy: frame number and copy of each entry, int `[E]` (see `attention.pattern`).
          pattern: which of them attend to which.
          action: int32 `[B, E]` in 0 .. num_actions (the last one: none).
          text: what `encode_text` returned, for a model with text.
          cache: clean frames that the entries attend to besides themselves.

        Returns:
          The velocity, float32 like `x`, and the entries' keys and values, `[L, B, N, E, T, D]`.

        Raises:
          ValueError: the frames are not of the model's size.
        """
        size = self.height, self.width, self.channels
        if x.shape[2:] != size:
            raise ValueError(f"the model takes frames of {size}, got {x.shape[2:]}")
        rows, columns = self.height // self.patch, self.width // self.patch
        p = self.patch
        tokens = einops.rearrange(x, "b e (r p) (s q) c -> b e (r s) (p q c)", p=p, q=p)
        h = mesh.constrain(self.patch_in(tokens), *ACTIVATIONS)

        time = self.embed_time(sigma)
        if self.num_actions:
            time = time + self.action(action)
        time = mesh.constrain(time, "batch", None, None)
        modulation = self.time_modulation(nn.silu(time))
        modulation = einops.rearrange(modulation, "b e (six d) -> b e six d", six=6)
        modulation = mesh.constrain(modulation, "batch", None, None, None)

        angles = rotary_angles(frame, rows, columns, self.head_dim, self.rotary_base)
        own = schedule.keep_static(pattern.mask((frame, copy), (frame, copy)))
        history = None
        if cache is not None:
            held = cache.frame, np.full(cache.slots, CLEAN)
            mask = schedule.keep_static(pattern.mask((frame, copy), held))
            history = mask, cache.key, cache.value
        layers = np.arange(self.layers, dtype=np.int32)
        h, key_value = self.blocks(h, (layers, text), modulation, angles, own, history)

        shift, scale = jnp.moveaxis(time[:, :, None] + self.head_modulation, 2, 0)
        out = self.head(modulated_norm(h, shift, scale)).astype(jnp.float32)
        out = mesh.constrain(out, "batch", None, None, None)  # latents are small, and whole
        out = einops.rearrange(
            out, "b e (r s) (p q c) -> b e (r p) (s q) c", r=rows, s=columns, p=p, q=p
        )
        return (flow.to_velocity(x, out, sigma) if self.prediction == "x0" else out), key_value
