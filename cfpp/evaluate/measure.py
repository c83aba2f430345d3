"""From clips to the figures of a row, on held-out episodes that are the same for every row."""

import dataclasses

import ml_collections
import numpy as np

from cfpp.data import arena, pipeline, sources
from cfpp.errors import UserError
from cfpp.evaluate import features, metrics, probe

INTACT_FRAMES = (1, 4, 9, 12)  # generated frames at which the balls are looked at

Figures = dict[str, metrics.Figure]
ByFrame = dict[str, list[metrics.Figure]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is generated and measured; the fields of `config.evaluate`.

    Attributes:
      episodes: held-out episodes.
      frames: generated frames of each.
      context: frames given before them.
      starts: first frames from which the balls' directions are sampled (arena, one given frame).
      samples: samples of each of these.
      probe_steps: training steps of the network that tells actions.
      seed: of the samplers' noise.
    """

    episodes: int = 64
    frames: int = 12
    context: int = 1
    starts: int = 8
    samples: int = 64
    probe_steps: int = 200
    seed: int = 0

    def __post_init__(self):
        for field, least in {
            "episodes": 2,
            "frames": features.WINDOW - 1,
            "context": 1,
            "starts": 2,
            "samples": 1,
            "probe_steps": 1,
            "seed": 0,
        }.items():
            if getattr(self, field) < least:
                raise UserError(
                    f"evaluate.{field} is {getattr(self, field)}; it must be at least {least}"
                )
        windows = self.frames + 2 - features.WINDOW  # of a clip
        if (self.episodes - 1) * windows < 2:
            raise UserError(
                f"evaluate.episodes is {self.episodes} and evaluate.frames {self.frames}: too few "
                "for a Frechet distance; give one more of either"
            )
        if self.seed >= 2**32:
            raise UserError(f"evaluate.seed is {self.seed}; it must be less than 2**32")

    @property
    def clips(self) -> int:
        """Held-out clips that are read: as many again are the Frechet distance's reference."""
        return 2 * self.episodes

    @property
    def length(self) -> int:
        """Frames of each."""
        return self.context + self.frames


def check(config: ml_collections.ConfigDict, data_config: ml_collections.ConfigDict) -> None:
    """Checks `config.evaluate` before there are models, or data.

    Raises:
      UserError: a setting is out of range, more clips are asked for than will be recorded, or the
        data are not RGB pixels without texts.
    """
    settings = Settings(**config)
    _check_kind(data_config)
    recorded = sources.recorded_clips(data_config, settings.length)
    if recorded is not None and recorded < settings.clips:
        raise UserError(
            f"evaluate.episodes is {settings.episodes}, which takes {settings.clips} clips of "
            f"{settings.length} frames; {data_config.name} is recorded with {recorded} such "
            "held-out clips (data.episodes, data.episode_frames)"
        )


def _check_kind(data_config: ml_collections.ConfigDict) -> None:
    for kind, field in {"latents": "latents", "texts": "text_tokens"}.items():
        if data_config[field]:
            raise UserError(
                f"{data_config.name} gives {kind} (data.{field}), and the evaluation is of RGB "
                "pixels steered by actions alone; train the stages one by one, and see what "
                "cfpp.rollout makes"
            )


def check_clips(config: ml_collections.ConfigDict, data_config: ml_collections.ConfigDict) -> None:
    """Checks that the data, which must be prepared, have the clips that `config.evaluate` takes.

    Of a recording `check` has told it already.

    Raises:
      UserError: they have fewer.
    """
    settings = Settings(**config)
    if sources.recorded_clips(data_config, settings.length) is not None:
        return
    _read_clips(data_config, settings)


def _read_clips(data_config: ml_collections.ConfigDict, settings: Settings) -> dict:
    try:
        return pipeline.test_clips(data_config, settings.clips, settings.length)
    except sources.MissingError:
        raise
    except UserError as error:
        raise UserError(
            f"no evaluation of {settings.episodes} episodes (evaluate.episodes, --episodes), which "
            f"takes twice as many clips: {error}"
        ) from error


@dataclasses.dataclass(frozen=True)
class Yardstick:
    """What every row is measured by.

    Attributes:
      settings: see `Settings`.
      video: uint8 `[E, context + frames, H, W, 3]`, the real clips.
      episodes: how many episodes these and the reference are cut from: 2 E, or fewer where there
        are too few.
      actions: int32 `[E, context + frames]`.
      states: of the arena, `[E, context + frames, ...]`; None in other worlds.
      starts: int, episodes from whose first frame directions are sampled; empty in other worlds.
      probe: tells actions; None in a world without.
      scale, reference: unit and real values of the features of the Frechet distance.
    """

    settings: Settings
    video: np.ndarray
    episodes: int
    actions: np.ndarray
    states: arena.States | None
    starts: np.ndarray
    probe: probe.Probe | None
    scale: np.ndarray
    reference: np.ndarray

    @property
    def given(self) -> np.ndarray:
        """The frames that every row starts from, uint8 `[E, context, H, W, 3]`."""
        return self.video[:, : self.settings.context]


def prepare(data_config: ml_collections.ConfigDict, settings: Settings) -> Yardstick:
    """Reads held-out clips and trains the probe on training episodes.

    The reference of the Frechet distance is as many other held-out clips, so that real clips do
    not score 0 but what no model can be expected to undercut.

    Raises:
      UserError: the data are not RGB pixels without texts, or too few.
    """
    _check_kind(data_config)
    episodes = settings.episodes
    clips = _read_clips(data_config, settings)
    video, actions = clips["video"][:episodes], clips["actions"][:episodes]
    references = clips["video"][episodes:, settings.context - 1 :]
    states, starts = None, np.zeros(0, int)
    if data_config.name == "arena":
        states = {name: value[:episodes] for name, value in clips["states"].items()}
        if settings.context == 1:
            away = metrics.away_from_walls(states["balls"][:, 0])
            starts = np.flatnonzero(away)[: settings.starts]
    scale = features.spread(references)
    teller = None
    if data_config.num_actions:
        train_episodes = sources.open_split(data_config, "train")
        teller = probe.train(train_episodes, data_config.num_actions, settings.probe_steps)
    return Yardstick(
        settings=settings,
        video=video,
        episodes=len(np.unique(clips["episode"])),
        actions=actions,
        states=states,
        starts=starts,
        probe=teller,
        scale=scale,
        reference=features.windows(references, scale),
    )


def intact_frames(settings: Settings) -> tuple[int, ...]:
    """The generated frames, counted from 1, at which the balls are looked at."""
    return tuple(frame for frame in INTACT_FRAMES if frame <= settings.frames)


def figures(
    yardstick: Yardstick, video: np.ndarray, sampled: np.ndarray | None
) -> tuple[Figures, ByFrame]:
    """Measures clips.

    Args:
      yardstick: from `prepare`.
      video: uint8 `[E, context + frames, H, W, 3]`, the given frames and what was generated.
      sampled: uint8 `[S, N, H, W, 3]`, samples of the frame after each start; None elsewhere than
        in the arena.

    Returns:
      `frechet` and, where there are actions, `action_accuracy`; in the arena also `agent_error`
      (pixels, at the last frame), `intact_<frame>` and `allowed` (shares), `turns` (a share, where
      any ball can be followed) and, with `sampled`, `directions` (total variation).
      And, in the arena, `agent_error` (pixels) and `intact` (share) at every generated frame.
    """
    settings = yardstick.settings
    context = settings.context
    values = features.windows(video[:, context - 1 :], yardstick.scale)
    result = {"frechet": metrics.frechet(values, yardstick.reference)}
    if yardstick.probe is not None:
        told = probe.predict_actions(yardstick.probe, video[:, context - 1 :])
        right = told == yardstick.actions[:, context:]
        result["action_accuracy"] = metrics.average(right.mean(1))
    if yardstick.states is None:
        return result, {}

    reading = arena.read(video)
    error, intact = metrics.agent_error(reading, yardstick.states["agent"]), reading.intact.mean(-1)
    by_frame = {
        "agent_error": [metrics.average(column) for column in error[:, context:].T],
        "intact": [metrics.average(column) for column in intact[:, context:].T],
    }
    result["agent_error"] = by_frame["agent_error"][-1]
    for frame in intact_frames(settings):
        result[f"intact_{frame}"] = by_frame["intact"][frame - 1]
    allowed = metrics.allowed_transitions(reading, yardstick.actions)[:, context - 1 :]
    result["allowed"] = metrics.average(allowed.mean(1))
    turned, known = (x[:, max(context - 2, 0) :] for x in metrics.turns(reading))
    if turns := metrics.share(turned, known):
        result["turns"] = turns
    if sampled is not None:
        balls = yardstick.states["balls"][yardstick.starts, 0]
        counts = metrics.direction_counts(arena.read(sampled), balls)
        distance = metrics.total_variation(counts, metrics.DIRECTION_LAW)
        result["directions"] = metrics.average(distance.mean(-1))
    return result, by_frame


def true_starts(yardstick: Yardstick) -> np.ndarray:
    """The arena's own samples of the frame after each start, uint8 `[S, N, 32, 32, 3]`."""
    rng = np.random.default_rng(yardstick.settings.seed)
    shape = (len(yardstick.starts), yardstick.settings.samples, arena.NUM_BALLS)
    velocities = arena.BALL_SPEED * arena.DIAGONALS[rng.integers(4, size=shape)]
    kicks = rng.choice(len(arena.KICK_LAW), size=shape, p=arena.KICK_LAW)
    balls = yardstick.states["balls"][yardstick.starts, :1]
    places, _ = arena.move_balls(balls, velocities, kicks)
    agent = yardstick.states["agent"][yardstick.starts, 1:2]
    return arena.render(np.broadcast_to(agent, (*shape[:2], 2)), places)
