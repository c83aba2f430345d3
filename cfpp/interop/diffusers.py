"""Wan 2.1's weights as the `diffusers` library names them, by way of Wan's original names.

The tensors are those of `interop.wan`, shapes included; only the names differ.
"""

from collections.abc import Mapping

import numpy as np

from cfpp.attention.pattern import Pattern
from cfpp.interop import wan
from cfpp.models.network import Network

# Modules and tables, diffusers' by Wan's: outside the blocks, and in a block.
_MODULES = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
_BLOCK_MODULES = {
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
} | {
    f"{wans}_attn.{module}": f"{theirs}.{name}"
    for wans, theirs in (("self", "attn1"), ("cross", "attn2"))
    for module, name in {
        "q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0",
        "norm_q": "norm_q", "norm_k": "norm_k",
    }.items()
}  # fmt: skip


def from_diffusers(weights: wan.Weights) -> dict:
    """Converts the state dict of a text-to-video `WanTransformer3DModel`.

    Args:
      weights: arrays by the names of diffusers.

    Returns:
      float32 parameters for a `DiT` of the same sizes.

    Raises:
      ValueError: a name that such a model does not have, or a block is incomplete.
    """
    return wan.from_wan(_to_wan(weights))


def network(
    weights: wan.Weights, pattern: Pattern, height: int, width: int, head_dim: int = 128, **model
) -> tuple[Network, dict]:
    """The network that such a state dict is of, and its parameters; see `wan.network`."""
    return wan.network(_to_wan(weights), pattern, height, width, head_dim, **model)


def to_diffusers(params: dict, patch: int) -> dict[str, np.ndarray]:
    """The inverse of `from_diffusers`, for a model with square patches of side `patch`.

    Raises:
      ValueError: the model takes actions, which Wan's does not.
    """
    return _renamed(wan.to_wan(params, patch), _MODULES, _BLOCK_MODULES)


def _to_wan(weights: wan.Weights) -> dict:
    return _renamed(weights, _inverse(_MODULES), _inverse(_BLOCK_MODULES))


def _inverse(names: Mapping[str, str]) -> dict[str, str]:
    return {theirs: wans for wans, theirs in names.items()}


def _renamed(weights: wan.Weights, modules: Mapping, block_modules: Mapping) -> dict:
    renamed = {}
    for name, value in weights.items():
        prefix, rest, table = "", name, modules
        if name.startswith("blocks."):
            blocks, index, rest = name.split(".", 2)
            prefix, table = f"{blocks}.{index}.", block_modules
        module, _, leaf = rest.rpartition(".")
        if rest in table:
            renamed[prefix + table[rest]] = value
        elif module in table:
            renamed[f"{prefix}{table[module]}.{leaf}"] = value
        else:
            raise ValueError(f"{name!r} is no tensor of Wan's text-to-video transformer")
    return renamed
