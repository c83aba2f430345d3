"""Which models of a work directory are evaluated, in which order, and how they generate."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import ml_collections
import numpy as np
from etils import epath

from cfpp.data import sources
from cfpp.errors import UserError
from cfpp.evaluate import metrics
from cfpp.models.network import Network, Params
from cfpp.rollout import generate
from cfpp.rollout.sampler import Sampler, euler, student_sampler
from cfpp.rollout.stream import Player
from cfpp.train import items, stored, workdirs

_STUDENTS = ("consistency", "ode", "dmd")  # whose schedule counts: the first of them that is there
SPEED_FRAMES = 48  # of a stream that is timed


@dataclasses.dataclass(frozen=True)
class Row:
    """A model and a way to sample from it: one row of the table.

    Attributes:
      key: short and fit for file names, such as 'cd_2'.
      title: what the model is, such as 'Student after CD'.
      steps: of the sampler.
      first_steps: of the consistency sampler for the first chunk; None is Euler's method.
      workdir: the stage's work directory.
      stage: the `config.stage` of that work directory.
      student: the configuration of the job's student, if there is one: by its schedule, or else
        at its own shift, an undistilled teacher is sampled.
    """

    key: str
    title: str
    steps: int
    first_steps: int | None
    workdir: epath.Path
    stage: str
    student: ml_collections.ConfigDict | None = None

    @property
    def name(self) -> str:
        """Model and steps, for people."""
        is_longer = self.first_steps not in (None, self.steps)
        first = f", first frame {self.first_steps}" if is_longer else ""
        return f"{self.title}, {self.steps} step{'s' * (self.steps > 1)}{first}"


# Every row of the table, in its order: key, title, stage, steps, and those of the first chunk, None
# for Euler's method.
_ROWS = (
    ("ar_48", "AR teacher", "ar_diffusion", 48, None),
    ("ar_1", "AR teacher, undistilled", "ar_diffusion", 1, 1),
    ("ar_2", "AR teacher, undistilled", "ar_diffusion", 2, 2),
    ("ar_4", "AR teacher, undistilled", "ar_diffusion", 4, 4),
    ("ar_2_first_4", "AR teacher, undistilled", "ar_diffusion", 2, 4),
    ("ode_1", "Student after causal ODE", "ode", 1, 1),
    ("ode_2", "Student after causal ODE", "ode", 2, 2),
    ("ode_4", "Student after causal ODE", "ode", 4, 4),
    ("ode_2_first_4", "Student after causal ODE", "ode", 2, 4),
    ("cd_1", "Student after CD", "consistency", 1, 1),
    ("cd_2", "Student after CD", "consistency", 2, 2),
    ("cd_4", "Student after CD", "consistency", 4, 4),
    ("cd_2_first_4", "Student after CD", "consistency", 2, 4),
    ("dmd_1", "Student after DMD", "dmd", 1, 1),
    ("dmd_2", "Student after DMD", "dmd", 2, 2),
    ("dmd_4", "Student after DMD", "dmd", 4, 4),
    ("dmd_2_first_4", "Student after DMD", "dmd", 2, 4),
    ("base_48", "Bidirectional base", "bidirectional", 48, None),
)


def find_stages(
    workdir: epath.PathLike,
) -> dict[epath.Path, ml_collections.ConfigDict]:
    """The finished stages in a work directory.

    Args:
      workdir: of one stage (or an export of one), or of a job of several stages.

    Returns:
      Their configs by their work directories, in the order in which they were trained.

    Raises:
      UserError: this is no work directory, or no stage has finished there.
    """
    workdir = epath.Path(workdir)
    if not (workdir / "config.json").exists():
        raise UserError(f"{workdir} has no config.json; give the --workdir of a training run")
    config = workdirs.read_config(workdir)
    folders = [workdir / job for job in config.jobs] if "jobs" in config else [workdir]
    begun = {
        folder: workdirs.read_config(folder)
        for folder in folders
        if (folder / "config.json").exists()
    }
    for folder, config in begun.items():
        needed = ("steps", "batch_size", *sources.FIELDS, *stored.needed(config))
        workdirs.require(config, folder / "config.json", needed)
    finished = {
        folder: config
        for folder, config in begun.items()
        if (folder / items.MODEL).is_dir() or config.steps in items.steps(folder / "checkpoints")
    }
    if not finished:
        names = ", ".join(str(folder) for folder in begun) or "none"
        raise UserError(f"no stage has finished in {workdir} (begun: {names}); train on first")
    return finished


def find_rows(stages: dict[epath.Path, ml_collections.ConfigDict]) -> list[Row]:
    """The rows that the finished stages `{work directory: config}` fill, in the table's order.

    Of several of one kind, the last: a teacher may have been trained in more than one job.
    """
    last = {config.stage: folder for folder, config in stages.items()}
    student = next((stages[last[stage]] for stage in _STUDENTS if stage in last), None)
    return [
        Row(key, title, steps, first_steps, last[stage], stage, student)
        for key, title, stage, steps, first_steps in _ROWS
        if stage in last
    ]


class Model(NamedTuple):
    """A loaded row.

    Attributes:
      stream: maps given frames uint8 `[B, K, H, W, 3]`, actions int32 `[B, K + N]` and a key to
        the frames that follow, as they come: pieces uint8 `[B, n, H, W, 3]`, at least N in all.
      piece: n, of pieces after the first.
      passes: network passes a frame, after the first chunk.
    """

    stream: Callable[[np.ndarray, np.ndarray, jax.Array], Iterator[np.ndarray]]
    piece: int
    passes: float

    def generate(self, context: np.ndarray, actions: np.ndarray, rng: jax.Array) -> np.ndarray:
        """The N frames that follow, uint8 `[B, N, H, W, 3]`; arguments as those of `stream`."""
        pieces = list(self.stream(context, actions, rng))
        return np.concatenate(pieces, axis=1)[:, : actions.shape[1] - context.shape[1]]


def load(rows: Sequence[Row]) -> list[Model]:
    """Loads the models of rows of one stage, ready to generate; its parameters are read once.

    Raises:
      UserError: the stage cannot be read, or its model can continue nothing.
    """
    found = stored.find(rows[0].workdir)
    network = found.network()
    params = network.for_inference(found.load())
    return [_model(row, network, found.config, params) for row in rows]


def _model(row: Row, network: Network, config: ml_collections.ConfigDict, params: Params) -> Model:
    if network.pattern.chunk is None:
        if config.data.frames < 2:
            raise UserError(f"{row.workdir} has learned single frames and can continue none")
        sampler = euler(row.steps, config.shift)
        stream = functools.partial(_blockwise, network, params, sampler, config.data.frames)
        return Model(stream, config.data.frames - 1, sampler.steps)
    if row.stage == "ar_diffusion" and row.first_steps:  # as if it were distilled
        sampler = student_sampler(row.student or config, row.steps, row.first_steps)
        rollout = generate.for_stage(network, config).replace(sampler=sampler)
    else:
        rollout = generate.for_stage(network, config, row.steps, row.first_steps)
    chunk = rollout.network.pattern.chunk
    return Model(functools.partial(_causal, rollout, params), chunk, rollout.passes / chunk)


def _causal(
    rollout: generate.Rollout,
    params: Params,
    context: np.ndarray,
    actions: np.ndarray,
    rng: jax.Array,
) -> Iterator[np.ndarray]:
    """Streams chunk by chunk."""
    given = context.shape[1]
    player = Player(rollout, params, context, {"actions": actions[:, :given]}, rng)
    later = np.pad(actions[:, given:], ((0, 0), (0, player.chunk - 1)), "edge")
    for first in range(0, actions.shape[1] - given, player.chunk):
        yield player.play(later[:, first : first + player.chunk])


def _blockwise(
    network: Network,
    params: Params,
    sampler: Sampler,
    frames: int,
    context: np.ndarray,
    actions: np.ndarray,
    rng: jax.Array,
) -> Iterator[np.ndarray]:
    """Generates from a bidirectional model, in blocks of the length that it was trained at.

    Each block starts from the last frame of the block before.
    """
    last = context[:, -1:]
    actions = np.pad(actions, ((0, 0), (0, frames)), "edge")
    total = actions.shape[1] - frames
    for first in range(context.shape[1] - 1, total - 1, frames - 1):
        condition = {"actions": actions[:, first : first + frames]}
        key = jax.random.fold_in(rng, first)
        block = generate.bidirectional_clip(
            network, params, last, condition, key, frames - 1, sampler
        )
        block = np.asarray(block)
        yield block
        last = block[:, -1:]


def speed(model: Model, context: np.ndarray, actions: np.ndarray) -> metrics.Figure:
    """Frames per second at batch 1, from the third piece of a stream on: all is compiled by then.

    Args:
      model: a loaded row.
      context: uint8 `[K, H, W, 3]`, the frames to start from.
      actions: int32 `[K]`, theirs, repeated for the frames that follow.
    """
    frames = max(SPEED_FRAMES, 4 * model.piece)
    actions = np.resize(actions, (1, len(context) + frames)).astype(np.int32)
    times = []
    for _ in model.stream(context[None], actions, jax.random.key(0)):
        times.append(time.perf_counter())
    seconds = (times[-1] - times[1]) / (len(times) - 2)
    return metrics.Figure(model.piece / seconds, np.nan)  # no error: see the column's meaning
