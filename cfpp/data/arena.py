"""The embedded world: a square that obeys, two balls that bounce and now and then turn.

Rows and columns are measured in pixels; the centre of the pixel `[r, c]` is the point `(r, c)`, so
the picture spans `[-0.5, 31.5]`. The balls live on a grid of half pixels and are reflected at the
two mirrors `LOW - 1/2` and `HIGH + 1/2`:

    p + v > HIGH  ->  2 HIGH + 1 - (p + v),  v -> -v        (and the same at LOW)        (1)

On one axis (1) is a bijection of the states (position, velocity), and so is a kick, which turns a
velocity by 90 degrees before the move. The uniform law over the states is therefore exactly
stationary. Episodes start from it, so the velocity of a ball, given one frame of any episode, is
uniform over the four diagonals: that is the chance which a video model has to reproduce.

Each object has a colour channel of its own, so objects never hide one another (where they cross,
their colours add up) and `read` finds them all in any frame.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import numpy as np

from cfpp.data.actions import held_actions
from cfpp.errors import UserError

SIZE = 32  # height and width of a frame, pixels
NUM_ACTIONS = 5  # stay, up, down, left, right
LONGEST_HOLD = 6  # frames a random action is held, at most
NUM_BALLS = 2

GROUND = 20  # brightness of the ground in every channel
PEAK = 235  # brightness of an object in its channel
AGENT_CHANNEL = 1
BALL_CHANNELS = (0, 2)

AGENT_SIZE = 5  # pixels
AGENT_HIGH = SIZE - AGENT_SIZE  # largest top-left row or column
AGENT_MOVES = 2 * np.array([[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1]], np.int32)  # by action

BALL_RADIUS = 2.6  # pixels
BALL_SPEED = 3  # half pixels a frame, on each axis
BALL_LOW, BALL_HIGH = 5, 57  # half pixels: the whole disc stays within the picture
KICK_PROBABILITY = 0.03  # a ball and frame
KICK_LAW = np.array([1 - KICK_PROBABILITY, KICK_PROBABILITY / 2, KICK_PROBABILITY / 2])

DIAGONALS = np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]])  # signs of row and column


class States(TypedDict):
    """The truth behind frames; leading axes `...`.

    Attributes:
      agent: int32 [..., 2], top-left row and column of the agent, pixels, in 0..AGENT_HIGH.
      balls: int32 [..., 2, 2], row and column of each ball's centre, half pixels, in
        BALL_LOW..BALL_HIGH.
      velocities: int32 [..., 2, 2], half pixels a frame, after the move that led to the frame.
      kicks: int32 [..., 2], what happened to each ball just before that move: 0 nothing, 1 its
        row velocity was flipped, 2 its column velocity.
    """

    agent: np.ndarray
    balls: np.ndarray
    velocities: np.ndarray
    kicks: np.ndarray


class Episode(TypedDict):
    """uint8 video [T, 32, 32, 3], int32 actions [T] and the States of the T frames."""

    video: np.ndarray
    actions: np.ndarray
    states: States


def move_agent(agent: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Moves the agent [..., 2] by the actions [...]; walls stop it."""
    return np.clip(agent + AGENT_MOVES[actions], 0, AGENT_HIGH)


def _reflect(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Folds positions (half pixels, integer or real) back between the mirrors, equation (1).

    Returns:
      The folded positions, and the factor 1 or -1 by which the velocities change.
    """
    above, below = positions > BALL_HIGH + 0.5, positions < BALL_LOW - 0.5
    folded = np.where(above, 2 * BALL_HIGH + 1 - positions, positions)
    folded = np.where(below, 2 * BALL_LOW - 1 - positions, folded)
    return folded, np.where(above | below, -1, 1)


def _turn(velocities: np.ndarray, kicks: np.ndarray) -> np.ndarray:
    """Velocities [..., 2] after kicks [...]: 0 none, 1 flips the row, 2 the column component."""
    return np.where(kicks[..., None] == np.array([1, 2]), -velocities, velocities)


def move_balls(
    balls: np.ndarray, velocities: np.ndarray, kicks: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Moves balls by one frame.

    Args:
      balls: [..., 2], row and column of centres, half pixels.
      velocities: [..., 2], half pixels a frame.
      kicks: [...], in 0..2.

    Returns:
      Positions and velocities after the frame.
    """
    turned = _turn(velocities, kicks)
    moved, factor = _reflect(balls + turned)
    return moved, turned * factor


def check_actions(actions: np.ndarray) -> np.ndarray:
    """Returns actions as int32 [T]; raises UserError if they are not a list of 0..4."""
    actions = np.asarray(actions)
    if actions.ndim != 1 or actions.size == 0 or not np.issubdtype(actions.dtype, np.integer):
        raise UserError(
            f"arena actions are {actions.dtype} {list(actions.shape)}; give one integer a frame, "
            "and at least one frame"
        )
    wrong = np.flatnonzero((actions < 0) | (actions >= NUM_ACTIONS))
    if wrong.size:
        raise UserError(
            f"arena action {actions[wrong[0]]} at frame {wrong[0]} is out of range; "
            "use 0 stay, 1 up, 2 down, 3 left, 4 right"
        )
    return actions.astype(np.int32)


class _Chance:
    """Random numbers that are the same with every NumPy: the raw bits of a named generator."""

    def __init__(self, seed: int | Sequence[int]):
        self._bits = np.random.PCG64(seed)

    def uniform(self, *shape: int) -> np.ndarray:
        """Float64 in [0, 1), 53 bits each."""
        raw = self._bits.random_raw(int(np.prod(shape)))
        return (raw >> np.uint64(11)).reshape(shape) * 2.0**-53

    def integers(self, count: int, *shape: int) -> np.ndarray:
        """Integers in 0..count-1."""
        return (self.uniform(*shape) * count).astype(np.int32)


def simulate(seed: int | Sequence[int], actions: np.ndarray) -> Episode:
    """Plays an episode; bit for bit the same for the same seed and actions.

    The world starts one frame before the first, so the first action has its effect too: the balls
    in their stationary law, the agent uniform over all places.

    Args:
      seed: non-negative integer or several, the source of the start and of the kicks.
      actions: integers [T] in 0..4; actions[t] leads from frame t-1 to frame t.

    Returns:
      The episode.

    Raises:
      UserError: for actions out of range or none at all.
    """
    actions = check_actions(actions)
    frames = len(actions)
    chance = _Chance(seed)
    agent = chance.integers(AGENT_HIGH + 1, 2)
    balls = BALL_LOW + chance.integers(BALL_HIGH - BALL_LOW + 1, NUM_BALLS, 2)
    velocities = BALL_SPEED * (2 * chance.integers(2, NUM_BALLS, 2) - 1)
    # One number decides whether there is a kick and which: the inverse of KICK_LAW's cumulative.
    kicks = np.searchsorted(
        np.cumsum(KICK_LAW)[:-1], chance.uniform(frames, NUM_BALLS), side="right"
    )

    states = States(
        agent=np.zeros((frames, 2), np.int32),
        balls=np.zeros((frames, NUM_BALLS, 2), np.int32),
        velocities=np.zeros((frames, NUM_BALLS, 2), np.int32),
        kicks=kicks.astype(np.int32),
    )
    for t in range(frames):
        agent = move_agent(agent, actions[t])
        balls, velocities = move_balls(balls, velocities, kicks[t])
        states["agent"][t], states["balls"][t], states["velocities"][t] = agent, balls, velocities
    return Episode(video=render(states["agent"], states["balls"]), actions=actions, states=states)


def _ball_brightness() -> np.ndarray:
    """Brightness uint8 of a pixel by its squared distance from a ball's centre, in half pixels."""
    distance = np.sqrt(np.arange(2 * (2 * SIZE) ** 2)) / 2
    coverage = np.clip(BALL_RADIUS + 0.5 - distance, 0, 1)
    return np.rint(GROUND + (PEAK - GROUND) * coverage).astype(np.uint8)


_BALL_BRIGHTNESS = _ball_brightness()


def render(agent: np.ndarray, balls: np.ndarray) -> np.ndarray:
    """Draws frames, each object alone in its channel.

    Args:
      agent: int [..., 2], top-left row and column, pixels.
      balls: int [..., 2, 2], row and column of centres, half pixels.

    Returns:
      uint8 [..., 32, 32, 3]. A ball's pixels fade over the one pixel around its radius.
    """
    pixels = np.arange(SIZE)
    video = np.full((*agent.shape[:-1], SIZE, SIZE, 3), GROUND, np.uint8)
    offset = pixels - agent[..., None]  # [..., 2, 32]
    inside = (offset >= 0) & (offset < AGENT_SIZE)
    video[..., AGENT_CHANNEL][inside[..., 0, :, None] & inside[..., 1, None, :]] = PEAK
    squares = np.square(2 * pixels - balls[..., None])  # [..., 2, 2, 32], half pixels
    distances = squares[..., 0, :, None] + squares[..., 1, None, :]  # [..., 2, 32, 32]
    for ball, channel in enumerate(BALL_CHANNELS):
        video[..., channel] = _BALL_BRIGHTNESS[distances[..., ball, :, :]]
    return video


def random_actions(rng: np.random.Generator, frames: int) -> np.ndarray:
    """Random actions int32 [frames], each held for 1 to 6 frames (uniform)."""
    if frames < 1:
        raise UserError(f"{frames} frames of random actions asked for; ask for at least 1")
    return np.fromiter(held_actions(rng, NUM_ACTIONS, LONGEST_HOLD), np.int32, frames)


def successors(
    agent: np.ndarray, balls: np.ndarray, velocities: np.ndarray, actions: np.ndarray
) -> tuple[States, np.ndarray]:
    """Every physically possible next state, with its exact probability.

    Each ball is kicked in one of three ways, independently: nine next states, all different.

    Args:
      agent: int [..., 2].
      balls: int [..., 2, 2].
      velocities: int [..., 2, 2].
      actions: int [...], in 0..4, each leading to the next state.

    Returns:
      States with axes [..., 9, (the state's own)] and their probabilities float64 [9].
    """
    kicks = np.stack(np.meshgrid(range(3), range(3), indexing="ij"), -1).reshape(9, NUM_BALLS)
    moved, turned = move_balls(balls[..., None, :, :], velocities[..., None, :, :], kicks)
    next_agent = move_agent(agent, actions)[..., None, :]
    states = States(
        agent=np.broadcast_to(next_agent, (*moved.shape[:-2], 2)).astype(np.int32),
        balls=moved.astype(np.int32),
        velocities=turned.astype(np.int32),
        kicks=np.broadcast_to(kicks, moved.shape[:-1]).astype(np.int32),
    )
    return states, KICK_LAW[kicks].prod(-1)


class Reading(NamedTuple):
    """Objects found in frames; leading axes `...` of the frames.

    Attributes:
      agent: float32 [..., 2], row and column of the agent's centre, pixels.
      agent_intact: bool [...].
      balls: float32 [..., 2, 2], row and column of each ball's centre, pixels.
      intact: bool [..., 2], for each ball.
    """

    agent: np.ndarray
    agent_intact: np.ndarray
    balls: np.ndarray
    intact: np.ndarray


# What `read` measures on a true object (brightness 0 ground .. 1 object): the mass, in pixels, and
# the spread, the mean squared distance from the centre, in square pixels. A ball's values are
# their mean over its four places within a pixel, from which each differs by less than 3 %.
AGENT_MASS, AGENT_SPREAD = 25.0, 4.0
BALL_MASS, BALL_SPREAD = 20.9, 3.44
FLOOR = 0.2  # darker is ground: the noise of a generated frame must not add up to mass
MASS_TOLERANCE = 0.3
CORE_LEAST = 0.7
SPREAD_MOST = 1.35
SHARE_LEAST = 0.85
ELONGATION_MOST = 0.3
WINDOW = 4.5  # half the side of the square around an object in which it is measured, pixels
_PIXELS = np.arange(SIZE, dtype=np.float32)
_BOX = (np.abs(_PIXELS[:, None] - _PIXELS) <= 3).astype(np.float32)  # box filter, 7 pixels


def _moments(brightness: np.ndarray, centre: np.ndarray, half: float) -> np.ndarray:
    """Moments sum(row^i column^j brightness) [..., 3, 3] in a square of half side around centre."""
    offset = _PIXELS - centre[..., None]  # [..., 2, 32]
    powers = np.stack([np.ones_like(offset), offset, offset**2], -2)  # [..., 2, 3, 32]
    powers *= (np.abs(offset) <= half)[..., None, :]
    return powers[..., 0, :, :] @ brightness @ np.swapaxes(powers[..., 1, :, :], -1, -2)


def read(video: np.ndarray) -> Reading:
    """Reads the objects out of frames, true or generated.

    An object is looked for in its own channel, where a 7 x 7 window holds the most brightness; its
    place is the centroid there. An object that is not there at all is placed in the middle of the
    picture and is not intact. It is intact if all of these hold, bounds in brackets:

    - mass: its channel's whole brightness is that of one object (within MASS_TOLERANCE: a doubled
      ball has 2, a faded one 1/2; a blur of 0.6 pixels with a noise of 8 of 255 keeps 0.89..1.02)
    - share of the mass within the window (SHARE_LEAST): no second thing elsewhere
    - core: mean brightness of the middle 3 x 3 pixels (CORE_LEAST: faded is 0.5, smeared to twice
      its size 0.25)
    - spread, relative to the true one (SPREAD_MOST: the same blur and noise give up to 1.15, twice
      the size gives 4)
    - elongation, (a - b)/(a + b) of the principal variances a >= b (ELONGATION_MOST: axes 1.36:1)

    Args:
      video: uint8 [..., 32, 32, 3].

    Returns:
      The Reading; balls in the order of `States`.
    """
    channels = [AGENT_CHANNEL, *BALL_CHANNELS]
    brightness = (video[..., channels].astype(np.float32) - GROUND) / (PEAK - GROUND)
    brightness = np.moveaxis(np.where(brightness < FLOOR, 0, brightness), -1, -3)
    true_mass = np.array([AGENT_MASS, BALL_MASS, BALL_MASS], np.float32)
    true_spread = np.array([AGENT_SPREAD, BALL_SPREAD, BALL_SPREAD], np.float32)

    mass = brightness.sum((-1, -2))  # [..., 3], as all below
    found = mass > 0
    blurred = _BOX @ brightness @ _BOX
    peak = blurred.reshape(*mass.shape, -1).argmax(-1)
    centre = np.stack(np.divmod(peak, SIZE), -1).astype(np.float32)
    for _ in range(2):  # the second time in a window that is well centred
        moments = _moments(brightness, centre, WINDOW)
        first = np.stack([moments[..., 1, 0], moments[..., 0, 1]], -1)
        centre += first / np.where(found, moments[..., 0, 0], 1)[..., None]
    centre = np.where(found[..., None], centre, np.float32((SIZE - 1) / 2))

    moments = _moments(brightness, centre, WINDOW)
    share = moments[..., 0, 0]
    moments = moments / np.where(found, share, 1)[..., None, None]
    rows = moments[..., 2, 0] - moments[..., 1, 0] ** 2
    columns = moments[..., 0, 2] - moments[..., 0, 1] ** 2
    mixed = moments[..., 1, 1] - moments[..., 1, 0] * moments[..., 0, 1]
    spread = rows + columns
    difference = np.hypot(rows - columns, 2 * mixed)  # of the principal variances
    core = _moments(brightness, centre, 1.5)[..., 0, 0]
    core_pixels = _moments(np.ones_like(brightness), centre, 1.5)[..., 0, 0]
    intact = (
        (np.abs(mass / true_mass - 1) <= MASS_TOLERANCE)
        & (share >= SHARE_LEAST * mass)
        & (core >= CORE_LEAST * core_pixels)
        & (spread <= SPREAD_MOST * true_spread)
        & (difference <= ELONGATION_MOST * spread)
    )
    return Reading(centre[..., 0, :], intact[..., 0], centre[..., 1:, :], intact[..., 1:])


def transition_allowed(
    before: np.ndarray | None, now: np.ndarray, after: np.ndarray, tolerance: float = 0.75
) -> np.ndarray:
    """Whether each ball's step from `now` to `after` is one that the physics allows.

    A ball at `now` has one of four velocities, and each says where it was before. Those that lie
    within the tolerance of `before` are possible (if none does, the nearest); then each possible
    velocity allows three steps: onwards, or with either component turned by a kick. Reflections
    are part of both. The test is lenient where two histories are nearly the same, by a wall.

    Args:
      before: float [..., 2], row and column of a ball's centre one frame earlier, pixels; None if
        nothing is known of it, and all four velocities are possible.
      now: float [..., 2].
      after: float [..., 2], one frame later.
      tolerance: largest distance from an exact place, pixels.

    Returns:
      bool [...].
    """
    velocities = BALL_SPEED * DIAGONALS  # after the move that led to now
    now, after = 2 * now[..., None, :], 2 * after[..., None, None, :]
    if before is None:
        possible = np.ones(len(velocities), bool)
    else:
        # (1) is undone by running it backwards in time.
        origins, _ = _reflect(now - velocities)  # [..., 4, 2]
        distance = np.linalg.norm(origins - 2 * before[..., None, :], axis=-1) / 2
        possible = distance <= np.maximum(tolerance, distance.min(-1, keepdims=True))
    places, _ = move_balls(now[..., None, :], velocities[:, None], np.arange(3))  # [..., 4, 3, 2]
    reached = np.linalg.norm(places - after, axis=-1) / 2 <= tolerance
    return (reached.any(-1) & possible).any(-1)
