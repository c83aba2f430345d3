"""The input pipeline: shuffled random windows of episodes, in batches, by Grain.

Everything is a pure function of (seed, position): the order of the episodes, the windows and so
every batch. The global batch is the same for any number of processes; each reads only the rows that
its devices need. An iterator's state is its position, a number, the same in all processes.
"""

import dataclasses
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence

import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags

from cfpp.data import sources
from cfpp.errors import UserError

PREFETCHED_BATCHES = 4  # in each process
EPOCHS = 2**31  # without end: `repeat()` is sys.maxsize windows, which batches of one overflow


def train_batches(
    data_config: ml_collections.ConfigDict,
    batch_size: int,
    seed: int,
    rows: Sequence[int] | None = None,
) -> grain.DatasetIterator:
    """Batches without end for one process.

    Args:
      data_config: the data part of the configuration; the dataset must be prepared.
      batch_size: of the whole batch, over all processes.
      seed: of the order and the windows.
      rows: those of each batch that this process needs, in this order; all of them if None.

    Returns:
      An iterator of what `batch_shapes` says, with as many rows. After `set_state(s)`, with s from
      `get_state()`, the very next batch comes, whatever the number of workers then and now.

    Raises:
      UserError: if the dataset cannot be read; while iterating, if a record cannot.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be at least 1")
    windows = (
        grain.MapDataset.source(sources.open_split(data_config, "train"))
        .seed(seed % 2**32)
        .shuffle()
        .repeat(EPOCHS)
        .random_map(functools.partial(_window, data_config=data_config))
    )
    rows = range(batch_size) if rows is None else tuple(rows)
    batches = grain.MapDataset.source(_Rows(windows, batch_size, rows)).batch(len(rows))
    return _BatchIterator(batches, data_config.workers)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Some rows of each batch, one after another; a sequence."""

    windows: Sequence
    batch_size: int
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.windows) // self.batch_size * len(self.rows)

    def __getitem__(self, index: int) -> dict:
        batch, row = divmod(index, len(self.rows))
        return self.windows[batch * self.batch_size + self.rows[row]]


class _BatchIterator(grain.DatasetIterator):
    """Reads batches ahead, in this process or in workers.

    Grain's own iterator over workers keeps a state for each of them, so that it could not go on
    with another number of workers. This one starts Grain's at its own position instead.
    """

    def __init__(self, batches: grain.MapDataset, workers: int):
        super().__init__()
        self._batches, self._workers = batches, workers
        self._position = 0
        self._reader = None  # Grain's iterator, made when the first batch is asked for

    def __next__(self) -> dict:
        if self._reader is None:
            self._reader = iter(self._read_ahead(self._batches[self._position :]))
        batch = next(self._reader)
        self._position += 1
        return batch

    def _read_ahead(self, batches: grain.MapDataset) -> grain.IterDataset:
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCHED_BATCHES)
        dataset = batches.to_iter_dataset(options)
        if not self._workers:
            return dataset
        if not flags.FLAGS.is_parsed():  # Grain reads its own flags, also where absl is not run
            flags.FLAGS.mark_as_parsed()
        return dataset.mp_prefetch(grain.MultiprocessingOptions(self._workers), _follow_parent)

    def get_state(self) -> dict[str, int]:
        return position(self._position)

    def set_state(self, state: dict[str, int]) -> None:
        self._stop()
        self._position = state["next_index"]

    def close(self) -> None:
        self._stop()
        super().close()

    def _stop(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None


def position(batches: int) -> dict[str, int]:
    """The state of a pipeline that has given so many batches."""
    return {"next_index": batches}


def _follow_parent(index: int, count: int) -> None:
    """Lets a worker live as long as the process that it reads for, no shorter and no longer.

    A SIGTERM to a whole group of processes is meant for that one, which takes batches until all
    have agreed on a step to save. And Grain's workers do not notice when it is killed.
    """
    del index, count
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    end_with = lambda: (parent.join(), os._exit(1))
    threading.Thread(target=end_with, daemon=True).start()


def batch_shapes(
    config: ml_collections.ConfigDict, sharding: jax.sharding.Sharding | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """What a batch of a stage holds, as shapes.

    Args:
      config: of the stage.
      sharding: of each array.

    Returns:
      `video` `[B, F, H, W, C]`, uint8, or bfloat16 where it is latents; `actions` int32 `[B, F]`
      and `text` bfloat16 `[B, length, text_dim]` where the model takes them.
    """
    data = config.data
    clip = (config.batch_size, data.frames)
    picture = (data.height, data.width, data.channels)
    dtype = jnp.bfloat16 if data.latents else jnp.uint8
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    shapes = {"video": shape(clip + picture, dtype)}
    if data.num_actions:
        shapes["actions"] = shape(clip, jnp.int32)
    if data.text_tokens:
        length = (config.batch_size, data.text_tokens, data.text_dim)
        shapes["text"] = shape(length, jnp.bfloat16)
    return shapes


def test_clips(data_config: ml_collections.ConfigDict, count: int, frames: int) -> dict:
    """The first clips of the test split, always the same.

    They start at the beginning of each test episode; if there are fewer episodes than clips, the
    next ones start where those ended.

    Args:
      data_config: the data part of the configuration; the dataset must be prepared.
      count: number of clips.
      frames: length of each.

    Returns:
      {'video': [count, frames, H, W, C], 'actions': int32 [count, frames]}, the number of each
      clip's episode, 'episode' int32 [count], and what else an episode has, 'text' or 'states'.

    Raises:
      UserError: if there are not that many.
    """
    if count < 1 or frames < 1:
        raise UserError(f"{count} test clips of {frames} frames asked for; ask for at least 1 of 1")
    episodes = sources.open_split(data_config, "test")
    clips, start, found = [], 0, True
    while found and len(clips) < count:
        found = False
        for index in range(len(episodes)):
            if len(clips) == count:
                break
            episode = episodes[index]
            if len(episode["video"]) >= start + frames:
                clips.append(_cut(episode, start, frames) | {"episode": np.int32(index)})
                found = True
        start += frames
    if not found:
        raise UserError(
            f"the test split of {data_config.name} has {len(clips)} clips of {frames} frames, but "
            f"{count} are asked for; ask for fewer or shorter ones"
        )
    return jax.tree.map(lambda *parts: np.stack(parts), *clips)


def _window(
    episode: dict, rng: np.random.Generator, data_config: ml_collections.ConfigDict
) -> dict:
    sources.check_length(data_config, episode, "a train episode")
    start = rng.integers(len(episode["video"]) - data_config.frames + 1)
    taken = {"video": True, "actions": data_config.num_actions, "text": data_config.text_tokens}
    wanted = {name: episode[name] for name, is_taken in taken.items() if is_taken}
    return _cut(wanted, start, data_config.frames)


def _cut(episode: dict, start: int, frames: int) -> dict:
    """Some frames of an episode; a text is that of all."""
    cut = lambda x: x[start : start + frames]
    return {name: x if name == "text" else jax.tree.map(cut, x) for name, x in episode.items()}
