"""Whether stored parameters fit a model."""

from typing import Any

import jax
import jax.numpy as jnp

from cfpp.errors import UserError


class MismatchError(UserError):
    """Parameters of another model."""


def check(wanted: Any, found: Any, where: str) -> None:
    """Compares the parameters that a model has with those that were stored.

    Args:
      wanted: the model's parameters, or their shapes.
      found: the stored ones, or their shapes.
      where: what holds `found`, for the message.

    Raises:
      MismatchError: names the first parameter that differs, and both shapes.
    """
    wanted, found = _by_name(wanted), _by_name(found)
    for name in [*wanted, *(name for name in found if name not in wanted)]:
        there, here = (_shape(tree[name]) if name in tree else "absent" for tree in (found, wanted))
        if there != here:
            raise MismatchError(
                f"{where} is of another model: parameter {name} is {there} there and {here} in "
                "this configuration"
            )


def _by_name(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _shape(leaf: Any) -> str:
    return f"{jnp.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"
