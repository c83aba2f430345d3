"""Whether stored parameters fit a model."""

from typing import Any

import jax
import jax.numpy as jnp

from cfpp.errors import UserError


class MismatchError(UserError):
    """Parameters of another model."""


def check(wanted: Any, found: Any, where: str, dtypes: bool = True) -> None:
    """Compares the parameters that a model has with those that were stored.

    Args:
      wanted: the model's parameters, or their shapes.
      found: the stored ones, or their shapes.
      where: what holds `found`, for the message.
      dtypes: whether these have to be the same too; an export's may be narrower.

    Raises:
      MismatchError: names the first parameter that differs, and both shapes.
    """
    wanted, found = _by_name(wanted), _by_name(found)
    for name in [*wanted, *(name for name in found if name not in wanted)]:
        there, here = found.get(name), wanted.get(name)
        both = there is not None and here is not None
        is_same = both and there.shape == here.shape and (there.dtype == here.dtype or not dtypes)
        if not is_same:
            raise MismatchError(
                f"{where} is of another model: parameter {name} is {_shown(there)} there and "
                f"{_shown(here)} in this configuration"
            )


def _by_name(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _shown(leaf: Any) -> str:
    if leaf is None:
        return "absent"
    return f"{jnp.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"
