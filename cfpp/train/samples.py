"""Sample videos of a run in training."""

import jax
import ml_collections
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from cfpp import media
from cfpp.data import pipeline
from cfpp.errors import UserError
from cfpp.models.network import Network, condition_of
from cfpp.parallel import hosts
from cfpp.rollout import generate
from cfpp.rollout.sampler import euler
from cfpp.stages import State
from cfpp.train.metrics import Writer

CLIPS = 4
BASE_STEPS = 24  # of Euler's method, for a bidirectional model


def check(config: ml_collections.ConfigDict) -> None:
    """Raises UserError if a run's data, which must be prepared, have too few clips for samples."""
    if not config.sample_every:
        return
    try:
        pipeline.test_clips(config.data, CLIPS, config.data.frames)
    except UserError as error:
        raise UserError(
            f"no samples can be drawn: {error}; or set config.sample_every=0"
        ) from error


def draw(
    config: ml_collections.ConfigDict,
    state: State,
    step: int,
    writer: Writer,
    workdir: epath.PathLike,
) -> None:
    """Continues held-out first frames with the model in training.

    Writes a video of the clips to `workdir/samples/<step>.mp4` and their frames, one clip a row
    with the truth above it, to `workdir/samples/<step>.png` and TensorBoard.

    Args:
      config: of the stage.
      state: its `ema` is the model.
      step: optimizer steps taken.
      writer: of the run's metrics.
      workdir: of the run.
    """
    clips = pipeline.test_clips(config.data, CLIPS, config.data.frames)
    context, condition = clips["video"][:, :1], condition_of(clips)
    asked = context, condition, jax.random.key(config.seed), config.data.frames - 1
    network = Network.create(config.model, config.pattern)
    if network.pattern.chunk is None:
        sampler = euler(BASE_STEPS, config.shift)
        video = generate.bidirectional_clip(network, state.ema, *asked, sampler)
    else:
        video = generate.for_stage(network, config).clip(state.ema, *asked)
    video = multihost_utils.process_allgather(video, tiled=True)
    if not hosts.is_first():
        return
    video = np.concatenate([context, video], 1)

    rows = np.stack([clips["video"], video], 1)  # [clips, truth | model, F, H, W, 3]
    sheet = media.tile(rows.reshape(-1, 1, *video.shape[2:]), config.data.frames)[0]
    folder = epath.Path(workdir) / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    media.write_image(folder / f"{step:06d}.png", media.enlarge(sheet, 2))
    media.write_mp4(folder / f"{step:06d}.mp4", media.tile(video, CLIPS), scale=4)
    writer.write_images(step, {"samples": media.enlarge(sheet, 2)[None]})
