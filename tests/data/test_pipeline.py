"""The input pipeline: what is in its batches, in which order, and after a restart."""

import contextlib
import itertools
import json
import pathlib
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest

from cfpp.data import arena, pipeline, sources
from cfpp.errors import UserError
from configs import stage0


def take(iterator, count: int) -> list[dict]:
    return [{k: np.array(v) for k, v in b.items()} for b in itertools.islice(iterator, count)]


def assert_same(first: list[dict], second: list[dict]) -> None:
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


def changed(config, **fields):
    copy = config.copy_and_resolve_references()
    copy.update(fields)
    return copy


def place(window: dict, episodes: list[dict]) -> tuple[int, int]:
    """Episode and first frame of a window; fails unless it is found exactly once."""
    found = [
        (number, start)
        for number, episode in enumerate(episodes)
        for start in range(16 - 8 + 1)
        if (episode["video"][start : start + 8] == window["video"]).all()
        and (episode["actions"][start : start + 8] == window["actions"]).all()
    ]
    assert len(found) == 1
    return found[0]


@pytest.fixture(scope="module")
def episodes(arena_config):
    source = sources.open_split(arena_config, "train")
    return [source[i] for i in range(len(source))]


def test_batches_have_the_stated_shapes(arena_config):
    batch = next(pipeline.train_batches(arena_config, 4, seed=0))
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        "video": ((4, 8, 32, 32, 3), np.uint8),
        "actions": ((4, 8), np.int32),
    }


def test_of_a_model_without_actions_batches_have_none(arena_config):
    """As `batch_shapes` says, by which the step is traced."""
    config = stage0.get_config("arena")
    config.data.update(changed(arena_config, num_actions=0))
    shapes = pipeline.batch_shapes(config)
    assert next(pipeline.train_batches(config.data, 4, seed=0)).keys() == shapes.keys() == {"video"}


def test_batches_of_one_are_the_rows_of_larger_ones(arena_config):
    ones = take(pipeline.train_batches(arena_config, 1, seed=0), 4)
    (four,) = take(pipeline.train_batches(arena_config, 4, seed=0), 1)
    assert_same([{k: np.concatenate([one[k] for one in ones]) for k in four}], [four])


def test_an_epoch_has_one_window_of_each_episode_and_windows_start_anywhere(arena_config, episodes):
    batches = take(pipeline.train_batches(arena_config, 12, seed=0), 12)
    orders, starts = [], set()
    for batch in batches:
        places = [
            place({key: value[i] for key, value in batch.items()}, episodes) for i in range(12)
        ]
        assert sorted(number for number, _ in places) == list(range(12))
        orders.append([number for number, _ in places])
        starts |= {start for _, start in places}
    assert orders[0] != orders[1]
    assert starts == set(range(9))  # missed by chance with probability 9 (8/9)^144 < 1e-6


def test_the_seed_decides_everything(arena_config):
    first = take(pipeline.train_batches(arena_config, 4, seed=1), 3)
    assert_same(first, take(pipeline.train_batches(arena_config, 4, seed=1), 3))
    other = take(pipeline.train_batches(arena_config, 4, seed=2), 3)
    assert any((a["video"] != b["video"]).any() for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("rows", [[0, 1, 2], [3, 4, 5], [1, 4], [5]])
def test_a_process_reads_its_rows_of_the_batches(arena_config, rows):
    whole = take(pipeline.train_batches(arena_config, 6, seed=0), 5)
    part = take(pipeline.train_batches(arena_config, 6, 0, rows), 5)
    assert_same(part, [{k: v[rows] for k, v in batch.items()} for batch in whole])


@pytest.mark.parametrize(("workers", "workers_later"), [(0, 0), (2, 2), (2, 0)])
def test_a_restored_iterator_goes_on_with_the_very_next_batch(arena_config, workers, workers_later):
    iterator = pipeline.train_batches(changed(arena_config, workers=workers), 4, seed=0)
    before = take(iterator, 5)
    state = json.loads(json.dumps(iterator.get_state()))
    iterator.close()
    expected = take(pipeline.train_batches(arena_config, 4, seed=0), 9)
    assert_same(before, expected[:5])

    restored = pipeline.train_batches(changed(arena_config, workers=workers_later), 4, seed=0)
    restored.set_state(state)
    assert_same(take(restored, 4), expected[5:])
    restored.close()


WORKER = """
import json, multiprocessing, os, signal, sys, time
import ml_collections
from cfpp.data import pipeline
config = ml_collections.ConfigDict(json.loads(sys.argv[1]))
batches = pipeline.train_batches(config, 4, seed=0)
next(batches)
(worker,) = multiprocessing.active_children()
os.kill(worker.pid, signal.SIGTERM)
for _ in range(3 * pipeline.PREFETCHED_BATCHES):
    next(batches)
print(worker.pid, flush=True)
time.sleep(100)
"""


def test_a_worker_lives_as_long_as_who_reads_from_it(arena_config):
    """Through a SIGTERM, after which batches are taken until a checkpoint is there."""
    config = json.dumps(changed(arena_config, workers=1).to_dict())
    command = [sys.executable, "-c", WORKER, config]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as reader:
        worker = pathlib.Path("/proc", reader.stdout.readline().strip())
        assert worker.is_dir()
        reader.kill()
    deadline = time.monotonic() + 30
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        # Where nobody asks for the exit code of an orphan, it stays as a zombie, in state Z.
        while (worker / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < deadline, "the worker is left behind"
            time.sleep(0.05)


def test_an_iterator_can_be_set_back(arena_config):
    iterator = pipeline.train_batches(arena_config, 4, seed=0)
    state = iterator.get_state()
    first = take(iterator, 3)
    iterator.set_state(state)
    assert_same(take(iterator, 3), first)


def test_windows_as_long_as_the_episodes_are_the_episodes(arena_config, episodes):
    batch = next(pipeline.train_batches(changed(arena_config, frames=16), 12, seed=0))
    found = {video.tobytes() for video in batch["video"]}
    assert found == {episode["video"].tobytes() for episode in episodes}


def test_too_long_a_window_is_refused(arena_config):
    config = changed(arena_config, frames=17)
    with pytest.raises(UserError, match=r"has 16 frames, but data.frames is 17"):
        sources.prepare(config)
    with pytest.raises(UserError, match=r"has 16 frames, but data.frames is 17"):
        next(pipeline.train_batches(config, 4, seed=0))


def test_an_empty_batch_is_refused(arena_config):
    with pytest.raises(UserError, match="batch_size is 0"):
        pipeline.train_batches(arena_config, 0, 0)


# --- test clips


def test_test_clips_are_the_starts_of_the_test_episodes(arena_config):
    clips = pipeline.test_clips(arena_config, 10, 5)
    source = sources.open_split(arena_config, "test")
    for i in range(10):
        np.testing.assert_array_equal(clips["video"][i], source[i]["video"][:5])
        np.testing.assert_array_equal(clips["actions"][i], source[i]["actions"][:5])
    np.testing.assert_array_equal(clips["episode"], np.arange(10))
    states = clips["states"]
    np.testing.assert_array_equal(arena.render(states["agent"], states["balls"]), clips["video"])


def test_more_clips_than_episodes_go_on_in_the_episodes(arena_config):
    clips = pipeline.test_clips(arena_config, 3 * 64, 5)
    source = sources.open_split(arena_config, "test")
    np.testing.assert_array_equal(clips["episode"], np.tile(np.arange(64), 3))
    np.testing.assert_array_equal(clips["video"][64 + 7], source[7]["video"][5:10])
    np.testing.assert_array_equal(clips["actions"][2 * 64 + 9], source[9]["actions"][10:15])
    with pytest.raises(UserError, match="has 192 clips of 5 frames, but 193"):
        pipeline.test_clips(arena_config, 3 * 64 + 1, 5)


def test_no_more_episodes_are_read_than_clips_need(arena_config):
    source = sources.open_split(arena_config, "test")
    with mock.patch.object(sources, "open_split") as opened:
        opened.return_value.__len__.return_value = len(source)
        opened.return_value.__getitem__.side_effect = source.__getitem__
        pipeline.test_clips(arena_config, 2, 5)
    assert opened.return_value.__getitem__.call_count == 2


@pytest.mark.parametrize(("count", "frames"), [(0, 5), (5, 0), (1, 17)])
def test_clips_that_cannot_be_had_are_refused(arena_config, count, frames):
    with pytest.raises(UserError, match=f"{frames} frames"):
        pipeline.test_clips(arena_config, count, frames)
