"""Gameplay of an Atari 2600 game as a TFDS dataset.

The player holds random actions of the game's minimal action set. Everything is deterministic: the
emulator's actions do not stick, and its seed and the player's are the split's number, 0 train, 1
test. A split is one long session, cut into episodes of one length; when a game ends, what it left
of an episode is dropped and the next game begins.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from cfpp.data import recording
from cfpp.data.actions import held_actions
from cfpp.errors import UserError

MOST_SHORT_GAMES = 100  # in a row that end within an episode, before recording gives up


@dataclasses.dataclass(kw_only=True)
class AtariConfig(recording.RecordingConfig):
    """A game, as ale-py names it ('boxing'), and the size of its pictures."""

    game: str
    height: int
    width: int

    def __post_init__(self):
        self.name = f"{self.game}-{self.height}x{self.width}-{self.episodes}x{self.episode_frames}"
        self.description = (
            f"{self.episodes} train episodes of {self.episode_frames} frames of {self.game}, one "
            "emulator frame in four, random held actions of the game's minimal action set."
        )


class Builder(recording.EpisodeBuilder):
    """Gameplay of one game."""

    VERSION = tfds.core.Version("1.1.0")  # 1.0.0 has fewer test episodes

    def features(self) -> tfds.features.FeaturesDict:
        """Video and actions."""
        config = self.builder_config
        return recording.episode_features(config.episode_frames, config.height, config.width)

    def play(self, split: str) -> Iterator[dict]:
        """Plays a session; the first n episodes are the same whatever number is recorded."""
        from cfpp.data import atari  # reading what was recorded needs no emulator

        config = self.builder_config
        seed = recording.SPLITS.index(split)
        emulator = atari.Emulator(config.game, config.height, config.width, seed)
        held = held_actions(np.random.default_rng(seed), emulator.num_actions, atari.LONGEST_HOLD)
        emulator.start()
        games = 0  # begun since the last whole episode
        while games < MOST_SHORT_GAMES:
            actions = np.zeros(config.episode_frames, np.int32)
            video = np.zeros((config.episode_frames, config.height, config.width, 3), np.uint8)
            for frame in range(config.episode_frames):
                actions[frame] = next(held)
                video[frame] = emulator.step(actions[frame])
                if emulator.over:
                    emulator.start()
                    games += 1
                    break
            else:
                games = 0
                yield {"video": video, "actions": actions}
        raise UserError(
            f"{games} games of {config.game} in a row were shorter than an episode of "
            f"{config.episode_frames} frames; give a smaller data.episode_frames"
        )
