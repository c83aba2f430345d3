"""Atari 2600 games, played at the rate and size of a video model by the emulator `ale-py`."""

import itertools
from collections.abc import Iterator

import ale_py
import numpy as np
from ale_py import roms
from PIL import Image

FRAME_SKIP = 4  # emulator frames, at 60 a second, for one of ours
LONGEST_HOLD = 12  # frames a random action is held, at most: 0.8 s
LONGEST_INTRODUCTION = 600  # emulator frames in which the first effect of an action is looked for


def games() -> list[str]:
    """The games that ale-py carries, by its own names."""
    return sorted(roms.get_all_rom_ids())


def num_actions(game: str) -> int:
    """Size of the game's minimal action set."""
    return len(_load(game, seed=0).getMinimalActionSet())


def _load(game: str, seed: int) -> ale_py.ALEInterface:
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    ale = ale_py.ALEInterface()
    ale.setInt("random_seed", seed)
    ale.setFloat("repeat_action_probability", 0.0)
    ale.loadROM(roms.get_rom_path(game))
    return ale


class Emulator:
    """A game at our frame rate and size."""

    def __init__(self, game: str, height: int, width: int, seed: int):
        self._ale = _load(game, seed)
        self._size = (width, height)
        self._buttons = self._ale.getMinimalActionSet()  # the first does nothing
        self._introduction = self._idle_frames()

    @property
    def num_actions(self) -> int:
        """Size of the game's minimal action set."""
        return len(self._buttons)

    @property
    def over(self) -> bool:
        """Whether the game has ended."""
        return self._ale.game_over()

    def start(self) -> None:
        """Begins a game at the moment when it begins to obey."""
        self._ale.reset_game()
        for _ in range(self._introduction):
            self._ale.act(self._buttons[0])

    def step(self, action: int) -> np.ndarray:
        """Plays one action, held for FRAME_SKIP frames; returns the picture uint8 [H, W, 3].

        The picture is the maximum of the last two frames: many games draw an object only in every
        other one.
        """
        for _ in range(FRAME_SKIP - 1):
            self._ale.act(self._buttons[action])
        former = self._ale.getScreenRGB()
        self._ale.act(self._buttons[action])
        screen = np.maximum(former, self._ale.getScreenRGB())
        return np.asarray(Image.fromarray(screen).resize(self._size, Image.Resampling.BOX))

    def _idle_frames(self) -> int:
        """Emulator frames after a reset in which no action has an effect on the screen."""

        def screens(button) -> Iterator[int]:
            self._ale.reset_game()
            while True:
                self._ale.act(button)
                yield hash(self._ale.getScreenRGB().tobytes())

        nothing, *others = self._buttons
        still = list(itertools.islice(screens(nothing), LONGEST_INTRODUCTION))
        idle = len(still)
        for button in others:
            for frame, screen in zip(range(idle), screens(button), strict=False):
                if screen != still[frame]:
                    idle = frame
                    break
        return idle if idle < len(still) else 0
