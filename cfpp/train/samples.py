"""Sample videos of a run in training."""

from typing import Any

import ml_collections


def samples(
    config: ml_collections.ConfigDict, state: Any, step: int, writer: Any, workdir: Any
) -> None:
    """Writes sample videos of the model in training; called every `config.sample_every` steps.

    Args:
      config: of the stage.
      state: its `ema` is the model.
      step: optimizer steps taken.
      writer: `cfpp.train.metrics.Writers`.
      workdir: videos go to its `samples/`.
    """
