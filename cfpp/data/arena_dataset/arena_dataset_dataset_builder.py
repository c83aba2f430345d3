"""Arena episodes as a TFDS dataset."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from cfpp.data import arena, recording


@dataclasses.dataclass(kw_only=True)
class ArenaConfig(recording.RecordingConfig):
    """A number of arena episodes of one length, which name the configuration."""

    def __post_init__(self):
        self.name = f"{self.episodes}x{self.episode_frames}"
        self.description = (
            f"{self.episodes} train episodes of {self.episode_frames} frames of the arena "
            "(cfpp.data.arena) with random held actions. Seed of an episode: (split, number), "
            "split 0 train, 1 test."
        )


class Builder(recording.EpisodeBuilder):
    """Arena episodes with the states behind their frames."""

    VERSION = tfds.core.Version("2.0.0")  # 1.0.0: actions and chance from one random stream

    def features(self) -> tfds.features.FeaturesDict:
        """Video, actions and `States`."""
        frames = self.builder_config.episode_frames
        balls = (frames, arena.NUM_BALLS)
        states = arena.States(
            agent=recording.tensor((frames, 2), np.int32),
            balls=recording.tensor((*balls, 2), np.int32),
            velocities=recording.tensor((*balls, 2), np.int32),
            kicks=recording.tensor(balls, np.int32),
        )
        return recording.episode_features(frames, arena.SIZE, arena.SIZE, states=states)

    def play(self, split: str) -> Iterator[dict]:
        """Episode n of a split depends on (split, n) alone."""
        number = 0
        while True:
            seed = [recording.SPLITS.index(split), number]
            # A stream of their own: from the world's they would tell of its chances.
            rng = np.random.default_rng([*seed, 1])
            actions = arena.random_actions(rng, self.builder_config.episode_frames)
            yield arena.simulate(seed, actions)
            number += 1
