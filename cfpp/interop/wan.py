"""Wan 2.1's weights, in their original names, to and from the parameters of `models.dit.DiT`.

One table says where each tensor goes. PyTorch keeps a linear layer's weight as `[out, in]`, flax
its kernel as `[in, out]`; flax stacks the blocks' parameters along a first axis.
"""

from collections.abc import Mapping

import flax.linen as nn
import numpy as np
from flax import traverse_util

from cfpp.attention.pattern import Pattern
from cfpp.models import shapes
from cfpp.models.dit import DiT
from cfpp.models.network import Network

Weights = Mapping[str, np.ndarray]

# Modules outside the blocks, ours by Wan's.
_MODULES = {
    "text_embedding.0": "text_in",
    "text_embedding.2": "text_out",
    "time_embedding.0": "time_in",
    "time_embedding.2": "time_out",
    "time_projection.1": "time_modulation",
    "head.head": "head",
}

# Modules of a block.
_BLOCK_MODULES = {
    "self_attn.q": "blocks/q",
    "self_attn.k": "blocks/k",
    "self_attn.v": "blocks/v",
    "self_attn.o": "blocks/o",
    "self_attn.norm_q": "blocks/norm_q",
    "self_attn.norm_k": "blocks/norm_k",
    "cross_attn.q": "blocks/cross_q",
    "cross_attn.k": "text_key_value/k",
    "cross_attn.v": "text_key_value/v",
    "cross_attn.o": "blocks/cross_o",
    "cross_attn.norm_q": "blocks/cross_norm_q",
    "cross_attn.norm_k": "text_key_value/norm_k",
    "norm3": "blocks/cross_norm",
    "ffn.0": "blocks/mlp_in",
    "ffn.2": "blocks/mlp_out",
}


def network(
    weights: Weights, pattern: Pattern, height: int, width: int, head_dim: int = 128, **model
) -> tuple[Network, dict]:
    """The network that a Wan state dict is of, and its parameters.

    Args:
      weights: arrays by Wan's original names; all sizes but those that follow are read from them.
      pattern: which frames attend to which.
      height, width: of a latent frame.
      head_dim: width of an attention head, 128 in all of Wan's models.
      model: other attributes of the `DiT`, such as `dtype`.

    Raises:
      ValueError: a tensor is lacking, or one that Wan's text-to-video model does not have.
      MismatchError: the tensors' shapes do not fit one another.
    """

    def shape(name):
        if name not in weights:
            raise ValueError(f"the weights lack {name}")
        return weights[name].shape

    params = from_wan(weights)
    dim, channels, _, patch, _ = shape("patch_embedding.weight")
    if dim % head_dim:
        raise ValueError(f"a width of {dim} does not split into heads of {head_dim}")
    shape("blocks.0.modulation")  # there, or `params` has no layers to count
    dit = DiT(
        channels=channels,
        height=height,
        width=width,
        patch=patch,
        dim=dim,
        ffn_dim=shape("blocks.0.ffn.0.weight")[0],
        heads=dim // head_dim,
        layers=len(params["blocks"]["modulation"]),
        frequency_dim=shape("time_embedding.0.weight")[1],
        text_dim=shape("text_embedding.0.weight")[1],
        **model,
    )
    dit.check()
    found = Network(dit, pattern)
    shapes.check(nn.meta.unbox(found.shapes()), params, "the state dict")
    return found, params


def from_wan(weights: Weights) -> dict:
    """Converts a Wan state dict.

    Args:
      weights: arrays by Wan's original names.

    Returns:
      float32 parameters for a `DiT` of the same sizes.

    Raises:
      ValueError: a name that Wan's text-to-video model does not have, or a block is incomplete.
    """
    flat: dict[str, np.ndarray] = {}
    blocks: dict[str, dict[int, np.ndarray]] = {}
    for name, value in weights.items():
        value = np.asarray(value, np.float32)
        if name.startswith("blocks."):
            _, index, name = name.split(".", 2)
            if name == "modulation":
                blocks.setdefault("blocks/modulation", {})[int(index)] = value[0]
                continue
            path, value = _layer(_BLOCK_MODULES, name, value)
            blocks.setdefault(path, {})[int(index)] = value
        elif name == "head.modulation":
            flat["head_modulation"] = value[0]
        elif name == "patch_embedding.weight":  # a convolution, [dim, C, 1, p, q]
            flat["patch_in/kernel"] = value[:, :, 0].transpose(2, 3, 1, 0).reshape(-1, len(value))
        elif name == "patch_embedding.bias":
            flat["patch_in/bias"] = value
        else:
            path, value = _layer(_MODULES, name, value)
            flat[path] = value
    depth = 1 + max((max(layers) for layers in blocks.values()), default=0)
    for path, layers in blocks.items():
        missing = set(range(depth)) - layers.keys()
        if missing:
            raise ValueError(f"the weights lack {path} of block {min(missing)}")
        flat[path] = np.stack([layers[index] for index in range(depth)])
    return traverse_util.unflatten_dict(flat, sep="/")


def to_wan(params: dict, patch: int) -> dict[str, np.ndarray]:
    """The inverse of `from_wan`, for a model with square patches of side `patch`.

    Raises:
      ValueError: the model takes actions, which Wan's does not.
    """
    if "action" in params:
        raise ValueError("Wan's format has no place for a model's action embedding")
    flat = traverse_util.flatten_dict(params, sep="/")
    flat = {path: np.asarray(value, np.float32) for path, value in flat.items()}
    kernel = flat["patch_in/kernel"]
    weights = {
        "head.modulation": flat["head_modulation"][None],
        "patch_embedding.bias": flat["patch_in/bias"],
        "patch_embedding.weight": kernel.reshape(patch, patch, -1, kernel.shape[-1]).transpose(
            3, 2, 0, 1
        )[:, :, None],
    }
    for module, path in _MODULES.items():
        weights |= {f"{module}.{leaf}": value for leaf, value in _leaves(flat, path)}
    for index, modulation in enumerate(flat["blocks/modulation"]):
        weights[f"blocks.{index}.modulation"] = modulation[None]
    for module, path in _BLOCK_MODULES.items():
        for leaf, layers in _leaves(flat, path):
            for index, value in enumerate(layers):
                weights[f"blocks.{index}.{module}.{leaf}"] = value
    return weights


def _layer(modules: dict[str, str], name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    module, _, leaf = name.rpartition(".")
    if module not in modules or leaf not in ("weight", "bias"):
        raise ValueError(f"{name!r} is no tensor of Wan's text-to-video transformer")
    if leaf == "bias":
        return f"{modules[module]}/bias", value
    if value.ndim == 1:
        return f"{modules[module]}/scale", value
    return f"{modules[module]}/kernel", value.T


def _leaves(flat: dict[str, np.ndarray], path: str):
    for ours, wans in (("kernel", "weight"), ("scale", "weight"), ("bias", "bias")):
        if f"{path}/{ours}" in flat:
            value = flat[f"{path}/{ours}"]
            yield wans, value.swapaxes(-1, -2) if ours == "kernel" else value
