"""The policy that records episodes and steers rollouts: random actions, each held for a while."""

from collections.abc import Iterator

import numpy as np


def held_actions(rng: np.random.Generator, num_actions: int, longest: int) -> Iterator[int]:
    """Random actions for ever, each held for 1 to `longest` frames."""
    while True:
        action, frames = rng.integers(num_actions), rng.integers(1, longest + 1)
        yield from [action] * frames
