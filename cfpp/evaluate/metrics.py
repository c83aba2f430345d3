"""What is measured on clips: pure functions of arrays, each with its standard error.

Everything that is drawn from one episode (or from one start) is dependent, so errors are taken over
*episodes*: of a mean by the spread of the episodes' own means, of anything else by the jackknife,
which leaves one episode out at a time. Where there are fewer episodes than clips they are taken
over clips, and the report says so.

The physics of the arena is read back out of the pictures by `cfpp.data.arena.read`, of real clips
as of generated ones. Letters: E episodes, T frames, S starts, N samples of one start.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import stats

from cfpp.data import arena

# How far, in pixels, an object may be from where physics puts it and still count as there: on each
# axis or, in `allowed_transitions`, a ball in all. It is half of a ball's step on an axis, so that
# a ball that stands still is not on its way.
TOLERANCE = arena.BALL_SPEED / 2 / 2

# ------------------------------------------------------------------------------ standard errors


class Figure(NamedTuple):
    """A measured number.

    Attributes:
      mean: the number.
      error: its standard error over episodes; NaN where one episode is all there is.
      values: float64 `[E]`, the episodes' own numbers where `mean` is their mean, else None.
    """

    mean: float
    error: float
    values: np.ndarray | None = None


def average(values: np.ndarray) -> Figure:
    """The mean of one number an episode `[E]` and its standard error, `std / sqrt(E)`."""
    values = np.asarray(values, np.float64)
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return Figure(float(values.mean()), float(error), values)


def jackknife(statistic: Callable[[np.ndarray], float], count: int) -> Figure:
    """A statistic of `count` episodes and its delete-one jackknife standard error.

    `error^2 = (n - 1)/n * sum_i (theta_i - mean theta)^2` with theta_i the statistic without
    episode i (Efron and Stein 1981); for a mean this is the usual standard error.

    Args:
      statistic: maps the indices of the episodes to use, int `[<= count]`, to a number.
      count: number of episodes.
    """
    indices = np.arange(count)
    value = float(statistic(indices))
    if count < 2:
        return Figure(value, np.nan)
    left_out = np.array([statistic(np.delete(indices, i)) for i in range(count)], np.float64)
    error = np.sqrt((count - 1) * np.mean((left_out - left_out.mean()) ** 2))
    return Figure(value, float(error))


def share(events: np.ndarray, cases: np.ndarray) -> Figure | None:
    """The share of cases that are events, and its jackknife error over episodes.

    Args:
      events: bool `[E, ...]`, True only where `cases` is.
      cases: bool `[E, ...]`; an episode may have many or none.

    Returns:
      None where all cases, or there are none, are of one episode.
    """
    events, cases = (x.reshape(len(x), -1).sum(1) for x in (events, cases))
    if cases.sum() == cases.max():
        return None
    return jackknife(lambda kept: events[kept].sum() / cases[kept].sum(), len(cases))


def difference(first: Figure, second: Figure) -> Figure:
    """`first - second`, over the same episodes where both have their values, else independent."""
    if first.values is not None and second.values is not None:
        if first.values.shape == second.values.shape:
            return average(first.values - second.values)
    return Figure(first.mean - second.mean, float(np.hypot(first.error, second.error)))


# ---------------------------------------------------------------------------- physics of the arena


def agent_error(reading: arena.Reading, agent: np.ndarray) -> np.ndarray:
    """Distance of the agent in a picture from where the actions have brought it.

    An agent that is not there at all is read in the middle of the picture, and counts as that.

    Args:
      reading: what `arena.read` saw, leading axes `[...]`.
      agent: int `[..., 2]`, the true top-left corner, pixels.

    Returns:
      float `[...]`, pixels between centres.
    """
    return np.linalg.norm(reading.agent - (agent + (arena.AGENT_SIZE - 1) / 2), axis=-1)


def allowed_transitions(reading: arena.Reading, actions: np.ndarray) -> np.ndarray:
    """Which frames physics allows to follow the frames before them.

    A step from frame t-1 to frame t is allowed if the agent and both balls are intact before and
    after, the agent has moved as its action says, and each ball has gone on or taken a kick, as
    far as its step before tells where it was heading (at first, or after a frame in which it was
    not intact, any diagonal will do). Positions count as right within `TOLERANCE` of where the
    positions seen one frame earlier lead, so errors do not add up over a clip.

    Args:
      reading: what `arena.read` saw in clips `[E, T, ...]`.
      actions: int `[E, T]`; `actions[:, t]` leads from frame t-1 to frame t.

    Returns:
      bool `[E, T-1]`.
    """
    whole = reading.agent_intact & reading.intact.all(-1)
    corner = reading.agent - (arena.AGENT_SIZE - 1) / 2
    expected = arena.move_agent(corner[:, :-1], actions[:, 1:])
    agent_right = (np.abs(expected - corner[:, 1:]) <= TOLERANCE).all(-1)

    now, after = reading.balls[:, :-1], reading.balls[:, 1:]
    right = arena.transition_allowed(None, now, after, TOLERANCE)
    known = arena.transition_allowed(now[:, :-1], now[:, 1:], after[:, 1:], TOLERANCE)
    right[:, 1:] &= known | ~reading.intact[:, :-2]
    return whole[:, :-1] & whole[:, 1:] & agent_right & right.all(-1)


def turns(reading: arena.Reading) -> tuple[np.ndarray, np.ndarray]:
    """Which balls turn where no wall can have turned them: by a kick, `arena.KICK_PROBABILITY`.

    That is known of a ball that is intact in three frames and takes two whole steps, from places
    out of reach of the walls. One that is smeared while it turns is not known to have turned.

    Args:
      reading: what `arena.read` saw in clips `[E, T, ...]`.

    Returns:
      Which turn with the step from frame t+1 to t+2, and of which it is known: bool `[E, T-2, 2]`.
    """
    step = np.diff(reading.balls, axis=1)  # [E, T-1, 2, 2]
    is_step = (np.abs(step) >= TOLERANCE).all(-1) & ball_away_from_walls(2 * reading.balls[:, :-1])
    is_step &= reading.intact[:, :-1] & reading.intact[:, 1:]
    known = is_step[:, :-1] & is_step[:, 1:]
    return known & (np.sign(step[:, :-1]) != np.sign(step[:, 1:])).any(-1), known


# ------------------------------------------------------------------------- directions of the balls

DIRECTION_LAW = np.full(4, 1 / 4)
"""Exact probabilities of `arena.DIAGONALS` for a ball's first step from one given frame: under the
stationary law the velocity is uniform, and a kick makes a uniform direction out of a uniform one.
"""


def ball_away_from_walls(balls: np.ndarray) -> np.ndarray:
    """Whether a ball at `[..., 2]` (half pixels) cannot reach a wall with its next step."""
    low, high = arena.BALL_LOW + arena.BALL_SPEED, arena.BALL_HIGH - arena.BALL_SPEED
    return ((balls >= low) & (balls <= high)).all(-1)


def away_from_walls(balls: np.ndarray) -> np.ndarray:
    """Whether neither ball at `[..., 2, 2]` (half pixels) can reach a wall with its next step.

    There the four velocities are four directions, with the probabilities `DIRECTION_LAW`.
    """
    return ball_away_from_walls(balls).all(-1)


def direction_counts(reading: arena.Reading, balls: np.ndarray) -> np.ndarray:
    """Counts the directions of the balls' first step over samples of one start.

    A ball has taken a direction if it is intact and has moved by `TOLERANCE` or more, half a true
    step, on both axes. One that is lost or stands still has taken none, which never happens truly.

    Args:
      reading: what `arena.read` saw in the sampled frames `[..., N, (its own)]`.
      balls: int `[..., 2, 2]`, positions in the given frame, half pixels, away from walls.

    Returns:
      int `[..., 2, 5]` for each ball: one count a diagonal, and the last for no direction.
    """
    step = reading.balls - balls[..., None, :, :] / 2  # [..., N, 2, 2]
    moved = reading.intact & (np.abs(step) >= TOLERANCE).all(-1)
    taken = moved[..., None] & (np.sign(step)[..., None, :] == arena.DIAGONALS).all(-1)
    return np.concatenate([taken, ~moved[..., None]], -1).sum(-3)


def total_variation(counts: np.ndarray, law: np.ndarray) -> np.ndarray:
    """Total-variation distance `1/2 sum |counts/N - law|` between counts and a law.

    A perfect sampler does not score 0 with finitely many samples; see `expected_total_variation`.

    Args:
      counts: int `[..., K]`; any further counts `[..., K:]` are of what never happens.
      law: float `[K]`.

    Returns:
      float64 `[...]` in [0, 1].
    """
    law = np.pad(law, (0, counts.shape[-1] - len(law)))
    return np.abs(counts / counts.sum(-1, keepdims=True) - law).sum(-1) / 2


def expected_total_variation(law: np.ndarray, samples: int) -> float:
    """What a perfect sampler of `law` `[K]` scores on average with so many samples; exact."""
    counts = np.arange(samples + 1)[:, None]
    chances = stats.binom.pmf(counts, samples, law)  # of each count of each outcome
    return float((np.abs(counts / samples - law) * chances).sum() / 2)


# -------------------------------------------------------------------------------- Frechet distance


def frechet_distance(
    mean1: np.ndarray, covariance1: np.ndarray, mean2: np.ndarray, covariance2: np.ndarray
) -> float:
    """Squared Wasserstein-2 distance of two Gaussians, the "Frechet distance" of FID and FVD.

    `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2)` (Dowson and Landau 1982). The last trace
    is the sum of the roots of the eigenvalues of a symmetric matrix: no general matrix root.

    Args:
      mean1, mean2: `[D]`.
      covariance1, covariance2: `[D, D]`, symmetric, positive semidefinite, any rank.
    """
    mean1, covariance1, mean2, covariance2 = (
        np.asarray(array, np.float64) for array in (mean1, covariance1, mean2, covariance2)
    )
    values, vectors = np.linalg.eigh(covariance1)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    eigenvalues = np.linalg.eigvalsh(root @ covariance2 @ root)
    cross = np.sqrt(np.maximum(eigenvalues, 0)).sum()
    distance = np.sum((mean1 - mean2) ** 2) + np.trace(covariance1 + covariance2) - 2 * cross
    return float(max(distance, 0.0))


def frechet(features: np.ndarray, reference: np.ndarray) -> Figure:
    """Frechet distance between Gaussians fitted to two sets of features.

    With finitely many samples it is biased upwards, the more so the fewer they are and the wider
    they spread: compare it with that of as many real clips to the same reference, not with 0. The
    jackknife gives the error over the episodes of `features`; the reference is the same for all
    and not varied.

    Args:
      features: `[E, M, D]`, M feature vectors an episode.
      reference: `[E', M', D]`, those of real clips.
    """
    mean, covariance = _moments(reference)

    def distance(episodes: np.ndarray) -> float:
        return frechet_distance(mean, covariance, *_moments(features[episodes]))

    return jackknife(distance, len(features))


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    flat = np.asarray(features, np.float64).reshape(-1, features.shape[-1])
    return flat.mean(0), np.atleast_2d(np.cov(flat, rowvar=False))
