"""Which models of a work directory are evaluated, in which order, and how they generate."""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from cfpp.errors import UserError
from cfpp.evaluate import metrics
from cfpp.models.network import Network, Params
from cfpp.rollout import generate
from cfpp.train import checkpoint
from cfpp.train import workdir as workdirs

SPEED_FRAMES = 24  # of a clip whose generation is timed
SPEED_REPEATS = 5

Generate = Callable[[np.ndarray, np.ndarray, jax.Array], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Row:
    """A model and a way to sample from it: one row of the table.

    Attributes:
      key: short and fit for file names, such as 'cd_2'.
      model: what the model is, such as 'Student after CD'.
      method: 'euler' or 'consistency'.
      steps: of the sampler.
      workdir: the stage's work directory.
      stage: the `config.stage` of that work directory.
    """

    key: str
    model: str
    method: str
    steps: int
    workdir: pathlib.Path
    stage: str

    @property
    def name(self) -> str:
        """Model and steps, for people."""
        return f"{self.model}, {self.steps} step{'s' * (self.steps > 1)}"


# Every row of the table, in its order: key, model, stage, method, steps.
_ROWS = (
    ("ar", "AR teacher", "ar_diffusion", "euler", 48),
    ("ar", "AR teacher, undistilled", "ar_diffusion", "consistency", 1),
    ("ar", "AR teacher, undistilled", "ar_diffusion", "consistency", 2),
    ("ode", "Student after causal ODE", "ode", "consistency", 1),
    ("ode", "Student after causal ODE", "ode", "consistency", 2),
    ("ode", "Student after causal ODE", "ode", "consistency", 4),
    ("cd", "Student after CD", "consistency", "consistency", 1),
    ("cd", "Student after CD", "consistency", "consistency", 2),
    ("cd", "Student after CD", "consistency", "consistency", 4),
    ("dmd", "Student after DMD", "dmd", "consistency", 1),
    ("dmd", "Student after DMD", "dmd", "consistency", 2),
    ("dmd", "Student after DMD", "dmd", "consistency", 4),
    ("base", "Bidirectional base", "bidirectional", "euler", 48),
)


def find_stages(
    workdir: str | pathlib.Path,
) -> dict[pathlib.Path, ml_collections.ConfigDict]:
    """The finished stages in a work directory.

    Args:
      workdir: of one stage (or an export of one), or of a job of several stages.

    Returns:
      Their configs by their work directories, in the order in which they were trained.

    Raises:
      UserError: this is no work directory, or no stage has finished there.
    """
    workdir = pathlib.Path(workdir)
    if not (workdir / "config.json").exists():
        raise UserError(f"{workdir} has no config.json; give the --workdir of a training run")
    config = workdirs.read_config(workdir)
    folders = [workdir / job for job in config.jobs] if "jobs" in config else [workdir]
    begun = {
        folder: workdirs.read_config(folder)
        for folder in folders
        if (folder / "config.json").exists()
    }
    finished = {
        folder: config
        for folder, config in begun.items()
        if (folder / checkpoint.MODEL).is_dir()
        or (folder / "checkpoints" / str(config.steps)).is_dir()
    }
    if not finished:
        names = ", ".join(str(folder) for folder in begun) or "none"
        raise UserError(f"no stage has finished in {workdir} (begun: {names}); train on first")
    return finished


def find_rows(stages: dict[pathlib.Path, ml_collections.ConfigDict]) -> list[Row]:
    """The rows that the finished stages `{work directory: config}` fill, in the table's order."""
    return [
        Row(f"{key}_{steps}", model, method, steps, folder, stage)
        for key, model, stage, method, steps in _ROWS
        for folder, config in stages.items()
        if config.stage == stage
    ]


class Model(NamedTuple):
    """A loaded row.

    Attributes:
      generate: maps given frames uint8 `[B, K, H, W, 3]`, actions int32 `[B, K + N]` and a key to
        the next frames, uint8 `[B, N, H, W, 3]`.
      passes: network passes a frame.
    """

    generate: Generate
    passes: int


def load(row: Row) -> Model:
    """Loads a row's model, ready to generate; UserError where it cannot be read."""
    config, params = checkpoint.load_model(row.workdir)
    network = Network.create(config.model, config.pattern)
    sampler = getattr(generate, row.method)(row.steps, config.shift)
    if row.stage == "bidirectional":
        return Model(_blockwise(config, network, params, sampler), sampler.steps)
    guidance = config.guidance if row.method == "euler" else 1.0  # distilled models have it in them
    rollout = generate.Rollout(network, sampler, guidance)

    def run(context, actions, rng):
        return np.asarray(rollout.clip(params, context, {"actions": actions}, rng))

    return Model(run, rollout.passes)


def _blockwise(
    config: ml_collections.ConfigDict,
    network: Network,
    params: Params,
    sampler: generate.Sampler,
) -> Generate:
    """Generation from a bidirectional model, in blocks of the length that it was trained at.

    Each block starts from the last frame of the block before.
    """
    block = config.data.frames - 1  # frames that one pass of the sampler adds

    def run(context, actions, rng):
        total = actions.shape[1] - context.shape[1]
        first = context.shape[1] - 1
        actions = jnp.pad(actions, ((0, 0), (0, block)), "edge")
        frames = [jnp.asarray(context[:, -1:])]
        for index, start in enumerate(range(first, first + total, block)):
            condition = {"actions": actions[:, start : start + block + 1]}
            key = jax.random.fold_in(rng, index)
            frames.append(
                generate.bidirectional_clip(
                    network, params, frames[-1][:, -1:], condition, key, sampler
                )
            )
        return np.asarray(jnp.concatenate(frames, axis=1)[:, 1 : total + 1])

    return run


def speed(model: Model, video: np.ndarray, actions: np.ndarray) -> metrics.Figure:
    """Generated frames per second at batch 1, compilation not counted.

    Args:
      model: a loaded row.
      video: uint8 `[K, H, W, 3]`, the frames to start from.
      actions: int32 `[K]`, theirs; they are repeated for the frames to generate.

    Returns:
      The mean over `SPEED_REPEATS` runs of `SPEED_FRAMES` frames; the error is over the runs.
    """
    actions = jnp.asarray(np.resize(actions, (1, len(video) + SPEED_FRAMES)))
    rates = []
    for repeat in range(SPEED_REPEATS + 1):
        begin = time.perf_counter()
        model.generate(video[None], actions, jax.random.key(repeat))
        rates.append(SPEED_FRAMES / (time.perf_counter() - begin))
    return metrics.average(rates[1:])._replace(values=None)
