"""Samplers: the noise levels that a chunk goes through, and the step from one to the next.

A teacher runs with Euler's method on the solver grid, a student with the consistency sampler at the
few positions of its config.
"""

from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from cfpp import flow

TEACHER_STEPS = 48  # that a many-step model takes, unless it is asked for others


class Sampler(flax.struct.PyTreeNode):
    """Noise levels and the step between them.

    Row 0 of the arrays is for the first generated chunk, which may take more steps, row 1 for the
    later ones. Levels are arrays and not constants of a program, so that samplers of one kind share
    what is compiled.

    Attributes:
      sigmas: falling noise levels, float32 `[2, width]`, filled up with zeros.
      last: int32 `[2]`, the last step, at which x0 is predicted: network passes less one.
      step: `flow.consistency_step` or `flow.euler_step`.
    """

    sigmas: np.ndarray
    last: np.ndarray
    step: Callable = flax.struct.field(pytree_node=False)

    @classmethod
    def create(cls, sigmas: Sequence[float], first: Sequence[float], step: Callable) -> "Sampler":
        """A sampler from falling noise levels that end in 0, and those of the first chunk."""
        rows = (first, sigmas)
        width = max(8, 2 ** int(np.ceil(np.log2(max(map(len, rows))))))  # few widths, few programs
        padded = np.zeros((2, width), np.float32)
        for row, levels in zip(padded, rows, strict=True):
            row[: len(levels)] = levels
        return cls(padded, np.array([len(levels) - 2 for levels in rows], np.int32), step)

    @property
    def steps(self) -> int:
        """Network passes of a chunk after the first, context pass not counted."""
        return int(self.last[1]) + 1

    def of_chunks(self, chunks: int) -> tuple[jax.Array, jax.Array]:
        """Noise levels `[chunks, width]` and last step `[chunks]` of each generated chunk."""
        rows = np.minimum(np.arange(chunks), 1)
        return jnp.asarray(self.sigmas)[rows], jnp.asarray(self.last)[rows]


def evenly(steps: int) -> tuple[float, ...]:
    """The usual few-step positions: `evenly(2)` is (1000, 500)."""
    return tuple(1000.0 * (1 - k / steps) for k in range(steps))


def consistency(steps: int, shift: float, first_steps: int | None = None) -> Sampler:
    """The consistency sampler at evenly spaced positions; `student_sampler` at a student's own."""
    sigmas, first = (flow.schedule(evenly(n), shift) for n in (steps, first_steps or steps))
    return Sampler.create(sigmas, first, flow.consistency_step)


def euler(steps: int, shift: float) -> Sampler:
    """Euler's method on the solver grid: what many-step teachers run with."""
    sigmas = flow.grid(steps, shift)
    return Sampler.create(sigmas, sigmas, flow.euler_step)


def student_sampler(
    config: ml_collections.ConfigDict, steps: int | None = None, first_steps: int | None = None
) -> Sampler:
    """The consistency sampler of a student, at the positions of its config.

    Args:
      config: of its stage: `shift`, `positions` and `first_positions`, of which the last two may be
        missing.
      steps: None is as many as `positions`, or 2.
      first_steps: of the first chunk; None is as many as `first_positions` where `steps` are as
        many as `positions`, or else `steps`.

    The steps of either kind of chunk are taken at its own positions if these are as many, else at
    the other kind's if those are, else at evenly spaced ones.
    """
    positions = config.get("positions", evenly(2))
    first_positions = config.get("first_positions", ()) or positions
    steps = steps or len(positions)
    first_steps = first_steps or (len(first_positions) if steps == len(positions) else steps)
    of = lambda n, *rows: next((row for row in rows if len(row) == n), evenly(n))
    rows = of(steps, positions, first_positions), of(first_steps, first_positions, positions)
    levels, first_levels = (flow.schedule(row, config.shift) for row in rows)
    return Sampler.create(levels, first_levels, flow.consistency_step)
