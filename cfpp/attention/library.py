"""Attention from libraries, in cfpp's interface: bars to beat, and choices a user may prefer.

    splash    JAX's Pallas kernel for TPU
    cudnn     NVIDIA's, by `jax.nn.dot_product_attention`
    tokamax   the package's best for the device (Mosaic GPU, Triton, XLA)

None of them gives a logsumexp in float32 with its gradient, so none can merge a cache with new
keys, and none takes a mask that is known only at run time: they serve training. Where a library
knows no masks of frames, each set of query frames that see the same keys is one dense call without
a mask; nothing invisible is computed then, at the price of copying the keys of each call.
"""

import functools
import importlib.metadata
from collections.abc import Callable

import einops
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

from cfpp.attention.schedule import Mask
from cfpp.errors import UserError, how_to_install, one_line

Dense = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # of `[B, length, N, D]`


def cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    layer: jax.Array | None = None,
    implementation: str = "cudnn",
) -> tuple[jax.Array, None]:
    """cuDNN's flash attention, as `reference.attend` but without a logsumexp.

    Args:
      implementation: of `jax.nn.dot_product_attention`; 'xla' runs on any device.

    Raises:
      ValueError: cuDNN cannot express this.
    """
    _check("cudnn", mask, layer)
    if implementation == "cudnn" and q.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"cudnn takes bfloat16 or float16, got {q.dtype}")
    if q.shape[-1] > 128 or q.shape[-1] % 8:
        raise ValueError(f"cudnn takes heads of a multiple of 8 up to 128, got {q.shape[-1]}")
    dense = functools.partial(jax.nn.dot_product_attention, implementation=implementation)
    return _by_frames(dense, q, k, v, mask), None


def tokamax(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    layer: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, None]:
    """The attention of the package tokamax, as `reference.attend` but without a logsumexp.

    Args:
      implementation: one of tokamax's; None is its best for the device.

    Raises:
      UserError: the package is not installed, or its version and JAX's do not go together.
      ValueError: it cannot express this.
    """
    _check("tokamax", mask, layer)
    package = _import_tokamax()
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # tokamax would else take the program's arguments for its own
    dense = functools.partial(package.dot_product_attention, implementation=implementation)
    return _by_frames(dense, q, k, v, mask), None


def _import_tokamax():
    """The package, which leans on parts of JAX that change from version to version."""
    try:
        import tokamax
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "tokamax":
            raise UserError(
                f"attention by tokamax needs the package; {how_to_install('tokamax')}"
            ) from None
        raise UserError(
            f"tokamax {importlib.metadata.version('tokamax')} cannot be imported beside JAX "
            f"{jax.__version__} ({one_line(error)}); take another version of one of "
            "them, or config.model.attention=auto"
        ) from error
    return tokamax


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    layer: jax.Array | None = None,
    interpret: bool = False,
    block: int = 512,
) -> tuple[jax.Array, None]:
    """JAX's splash attention for TPU, as `reference.attend` but without a logsumexp.

    Args:
      interpret: whether to run the kernel in Pallas's interpreter, on any device.
      block: rows, and columns, of a block; fewer where there are fewer.

    Raises:
      ValueError: it cannot express this: see `FrameMask`.
    """
    _check("splash", mask, layer)
    heads, _, tokens, head_dim = q.shape[1:]
    rows, columns = (frames * tokens for frames in mask.shape)
    block = min(block, 128 * -(-min(rows, columns) // 128))
    fill = lambda length: -length % block
    frame_mask = FrameMask(mask, tokens, rows + fill(rows), columns + fill(columns))
    sizes = {
        name: block
        for name in splash_attention_kernel.BlockSizes.__dataclass_fields__
        if name.startswith("block")
    }
    kernel = splash_attention_kernel.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([frame_mask] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(**sizes),
        interpret=interpret,
    )
    scaled = (q.astype(jnp.float32) / np.sqrt(head_dim)).astype(q.dtype)
    flat = (einops.rearrange(x, "b n e t d -> b n (e t) d") for x in (scaled, k, v))
    q_flat, k_flat, v_flat = (
        jnp.pad(x, ((0, 0), (0, 0), (0, fill(x.shape[2])), (0, 0))) for x in flat
    )
    out = jax.vmap(kernel)(q_flat, k_flat, v_flat)
    return out[:, :, :rows].reshape(q.shape), None


class FrameMask(splash_attention_mask._ComputableMask):
    """A mask of frames that splash attention's kernels compute: nothing of its size is stored.

    The kernel hands the mask function an integer for each row, which need not be the row's number:
    here it is what the row sees, as the ends of runs of key frames, packed.
    """

    def __init__(self, mask: np.ndarray, tokens: int, rows: int, columns: int):
        """Makes the mask.

        Args:
          mask: bool `[query frames, key frames]`.
          tokens: of a frame.
          rows, columns: of the whole mask; what lies behind the last frame is padding.

        Raises:
          ValueError: some frame sees no key, or its runs of frames do not fit into 31 bits.
        """
        if not mask.any(1).all():
            raise ValueError("splash needs every frame to see some key, got one that sees none")
        edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(int), axis=1)
        runs = (edges == 1).sum(1).max()
        width = mask.shape[1].bit_length()
        if 2 * runs * width > 31:
            raise ValueError(
                f"splash takes masks of at most {31 // (2 * width)} runs of {mask.shape[1]} key "
                f"frames, got {runs}"
            )
        codes = []
        for edge in edges:
            ends = np.resize(np.flatnonzero(edge), 2 * runs)  # repeats runs where there are fewer
            codes.append(sum(int(end) << place * width for place, end in enumerate(ends)))

        def visible(code, position):
            # Not `position // tokens`: Mosaic lowers that only where it finds a TPU.
            end = lambda place: ((code >> place * width) & (2**width - 1)) * tokens
            seen = [(end(2 * n) <= position) & (position < end(2 * n + 1)) for n in range(runs)]
            return functools.reduce(lambda a, b: a | b, seen)

        super().__init__((rows, columns), visible)
        self.mask, self.tokens = mask, tokens
        codes = np.repeat(np.array(codes, np.int32), tokens)
        self.q_sequence = np.pad(codes, (0, rows - len(codes)), "edge")

    def __getitem__(self, index):
        """The mask of a block: a constant, quickly, where its frames see all or nothing of it."""
        index = [slice(*part.indices(size)) for part, size in zip(index, self.shape, strict=True)]
        # A row behind the last frame counts as that one; a column behind it is never seen.
        padded = np.pad(self.mask, ((0, 0), (0, 1)))
        frames = [
            np.minimum(np.arange(part.start // self.tokens, -(-part.stop // self.tokens)), last)
            for part, last in zip(index, np.array(padded.shape) - 1, strict=True)
        ]
        seen = padded[np.ix_(*frames)]
        if seen.all() or not seen.any():
            return np.full([part.stop - part.start for part in index], seen.flat[0])
        return super().__getitem__(index)

    def __eq__(self, other):
        return self is other

    def __hash__(self):
        return id(self)


def _check(name: str, mask: Mask, layer) -> None:
    """Raises ValueError for what no library can do."""
    if layer is not None or not isinstance(mask, np.ndarray):
        raise ValueError(
            f"{name} cannot attend to a cache, whose mask is known only at run time; "
            "use auto, reference, xla or a Pallas kernel"
        )


def _by_frames(dense: Dense, q, k, v, mask: np.ndarray) -> jax.Array:
    """One dense call for each set of query frames that see the same key frames."""
    flat = lambda x: einops.rearrange(x, "b n e t d -> b (e t) n d")
    out = jnp.zeros_like(q)
    for row in np.unique(mask, axis=0):
        if not row.any():
            continue
        queries = np.flatnonzero((mask == row).all(1))
        part = dense(flat(q[:, :, queries]), flat(k[:, :, row]), flat(v[:, :, row]))
        part = einops.rearrange(part, "b (e t) n d -> b n e t d", e=len(queries))
        out = out.at[:, :, queries].set(part)
    return out
