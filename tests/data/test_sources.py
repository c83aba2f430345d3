"""Recording and reading datasets, and what is said when that cannot be done."""

import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from cfpp.data import arena, pipeline, recording, sources
from cfpp.data.arena_dataset import arena_dataset_dataset_builder
from cfpp.errors import UserError
from tests.data.small import make_config


def record_files(config) -> list[Path]:
    return sorted(Path(config.directory).glob("**/*-train.array_record*"))


def contents(config, split: str) -> list[dict]:
    source = sources.open_split(config, split)
    return [source[i] for i in range(len(source))]


# --- recording the arena


@pytest.mark.parametrize(("split", "number", "episodes"), [("train", 0, 12), ("test", 1, 64)])
def test_arena_episodes_follow_from_their_seeds(arena_config, split, number, episodes):
    recorded = contents(arena_config, split)
    assert len(recorded) == episodes
    for index in (0, 1, 11):
        expected = arena.simulate([number, index], recorded[index]["actions"])
        np.testing.assert_array_equal(recorded[index]["video"], expected["video"])
        for name, values in expected["states"].items():
            np.testing.assert_array_equal(recorded[index]["states"][name], values)


def test_actions_tell_nothing_of_chance(tmp_path):
    """From the world's own random stream they did: correlations of 0.5 with the first frame."""
    config = arena_dataset_dataset_builder.ArenaConfig(episodes=400, episode_frames=40)
    builder = arena_dataset_dataset_builder.Builder(config=config, data_dir=tmp_path)
    episodes = list(itertools.islice(builder.play("train"), 400))
    first = [[values[0].ravel() for values in e["states"].values()] for e in episodes]
    chance = np.stack([np.concatenate(values) for values in first]).astype(float)
    actions = np.stack([episode["actions"] for episode in episodes])
    held = np.concatenate([actions == a for a in range(arena.NUM_ACTIONS)], 1).astype(float)
    standard = lambda x: (x - x.mean(0)) / x.std(0)
    correlation = standard(chance).T @ standard(held) / len(episodes)
    assert np.abs(correlation).max() < 0.25  # 5 standard errors, for 3,600 pairs


def test_what_is_recorded_is_not_recorded_again(arena_config, monkeypatch):
    monkeypatch.setattr(sources, "_record", None)
    sources.prepare(arena_config)


def test_other_numbers_are_another_dataset(arena_config):
    config = make_config(arena_config.directory, episodes=13)
    with pytest.raises(UserError, match=r"arena is not recorded in .*13x16"):
        sources.open_split(config, "train")


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGINT])
def test_a_recording_that_was_interrupted_is_not_a_dataset(tmp_path, death):
    command = [sys.executable, "-m", "cfpp.data.prepare", "--data=arena"]
    command += [f"--directory={tmp_path}", "--episodes=100000"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("arena_dataset/*/incomplete*/*")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(death)
    assert process.wait() != 0
    config = make_config(tmp_path, episodes=100000, episode_frames=64)
    with pytest.raises(UserError, match="not recorded"):
        sources.open_split(config, "train")


def test_recording_leaves_no_temporary_folders(tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    sources.prepare(make_config(tmp_path / "data"))
    assert not list((tmp_path / "tmp").iterdir())


def test_a_second_process_that_records_the_same_is_no_fault(tmp_path, monkeypatch):
    config = make_config(tmp_path)
    play = sources.arena_dataset_dataset_builder.Builder.play

    def play_late(self, split):
        monkeypatch.undo()
        sources.prepare(config)  # the other process comes first
        return play(self, split)

    monkeypatch.setattr(sources.arena_dataset_dataset_builder.Builder, "play", play_late)
    sources.prepare(config)
    assert len(sources.open_split(config, "train")) == 12


def test_the_command_records_and_says_where(tmp_path):
    command = [sys.executable, "-m", "cfpp.data.prepare", f"--directory={tmp_path}"]
    command += ["--episodes=3", "--episode_frames=5"]
    good = subprocess.run([*command, "--data=arena"], capture_output=True, text=True, check=True)
    assert "3 train episodes of 5 frames 32x32, 5 actions" in good.stdout
    assert "100%" in good.stderr  # the progress bar
    bad = subprocess.run([*command, "--data=arean"], capture_output=True, text=True)
    assert bad.returncode == 2
    assert bad.stderr == (
        "error: no data source 'arean'; did you mean 'arena'?; "
        "give arena, atari:<game> or tfds:<dataset>\n"
    )


def test_reading_needs_neither_tensorflow_nor_jax():
    code = "import sys, cfpp.data.sources; print({'jax', 'tensorflow', 'ale_py'} & {*sys.modules})"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert output.stdout == "set()\n"


# --- what can be wrong with the configuration


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "arenas"}, "no data source 'arenas'; did you mean 'arena'"),
        ({"name": "tfds"}, "no data source 'tfds'"),
        ({"name": "tfds:"}, "no data source 'tfds:'; give arena, atari:<game> or tfds:<dataset>"),
        ({"height": 64}, "data.height and data.width are 64 and 32; the arena's pictures are 32"),
        ({"num_actions": 4}, "data.num_actions is 4; arena has 5"),
        ({"episodes": 0}, "data.episodes is 0"),
        ({"episode_frames": -1}, "data.episode_frames is -1"),
        ({"name": "atari:Boxing", "height": 0}, "data.height is 0"),
    ],
)
def test_wrong_settings_are_named(tmp_path, fields, message):
    with pytest.raises(UserError) as caught:
        sources.check(make_config(tmp_path, **fields))
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_actions_beyond_the_configured_number_are_refused(arena_config):
    with pytest.raises(UserError, match=r"data.num_actions is 2; they should be 0 to 1"):
        contents(make_config(arena_config.directory, num_actions=2), "train")


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot record arena in .*file/data: .*Not a directory"):
        sources.prepare(make_config(tmp_path / "file" / "data"))


# --- damaged files


@pytest.fixture
def damaged(tmp_path):
    """A prepared dataset of its own, to be damaged."""
    config = make_config(tmp_path)
    sources.prepare(config)
    return config


def test_a_damaged_record_is_an_error_that_names_its_file(damaged):
    [file] = record_files(damaged)
    data = np.fromfile(file, np.uint8)
    used = np.flatnonzero(data)  # the rest is padding
    data[used[len(used) // 2]] ^= 1
    data.tofile(file)
    with pytest.raises(UserError) as caught:
        contents(damaged, "train")
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert len(contents(damaged, "test")) == 64


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_file_stops_training_with_an_error_that_names_it(damaged, workers):
    [file] = record_files(damaged)
    file.write_bytes(file.read_bytes()[:1000])
    damaged.workers = workers
    batches = pipeline.train_batches(damaged, 4, seed=0)
    with pytest.raises(UserError) as caught:
        next(batches)
    assert str(file) in str(caught.value)


def test_a_file_of_one_block_is_named(tmp_path):
    """So much of it reads as records without contents."""
    config = make_config(tmp_path, episodes=32, episode_frames=64)
    sources.prepare(config)
    [file] = record_files(config)
    file.write_bytes(file.read_bytes()[: 2**16])
    with pytest.raises(UserError, match=r"cannot read record \d+ from .*train\.array_record"):
        contents(config, "train")


def test_a_missing_file_is_named(damaged):
    [file] = record_files(damaged)
    file.unlink()
    with pytest.raises(UserError, match=r"No such file.*train.array_record"):
        sources.prepare(damaged)


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("length", [0, 100, None])
def test_damaged_metadata_is_an_error_that_names_the_dataset(damaged, name, length):
    [file] = Path(damaged.directory).glob(f"arena_dataset/**/{name}")
    if length is None:
        file.unlink()
    else:
        file.write_text(file.read_text()[:length])
    with pytest.raises(UserError, match=f"cannot read the dataset in {file.parent}"):
        sources.prepare(damaged)


# --- any TFDS dataset


class Plays(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A foreign dataset: its own feature names, episodes of 9, 10, 11, ... frames."""

    VERSION = tfds.core.Version("1.2.0")
    sizes: dict[str, int]

    def __init__(self, sizes, **options):
        self.sizes = sizes
        super().__init__(file_format="array_record", **options)

    def _info(self):
        features = {
            "clip": recording.tensor((None, 8, 16, 3), np.uint8),
            "button": tfds.features.Tensor(shape=(None,), dtype=np.int64),
            "depth": tfds.features.Tensor(shape=(None, 2), dtype=np.float32),
            "words": tfds.features.Tensor(shape=(3, 7), dtype=np.float32),
            "states": tfds.features.Tensor(shape=(7,), dtype=np.float32),  # not as the arena's
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self.sizes}

    def _generate_examples(self, split):
        for i in range(self.sizes[split]):
            rng = np.random.default_rng([len(split), i])
            yield (
                i,
                {
                    "clip": rng.integers(256, size=(9 + i, 8, 16, 3), dtype=np.uint8),
                    "button": np.arange(9 + i) % 3,
                    "depth": np.zeros((9 + i, 2), np.float32),
                    "words": np.full((3, 7), i, np.float32),
                    "states": np.zeros(7, np.float32),
                },
            )


def prepare_plays(directory, **sizes):
    Plays(sizes, data_dir=directory).download_and_prepare()
    return make_config(
        directory,
        name="tfds:plays",
        height=8,
        width=16,
        num_actions=3,
        video_feature="clip",
        action_feature="button",
    )


@pytest.fixture(scope="module")
def plays(tmp_path_factory):
    return prepare_plays(tmp_path_factory.mktemp("plays"), train=20, test=3)


def test_any_prepared_dataset_can_be_read(plays):
    sources.prepare(plays)
    train, test = contents(plays, "train"), contents(plays, "test")
    assert [len(episode["video"]) for episode in train] == list(range(9, 29))
    np.testing.assert_array_equal(train[3]["actions"], np.arange(12) % 3)
    assert train[3]["actions"].dtype == np.int32 and len(test) == 3
    batch = next(pipeline.train_batches(plays, 20, seed=0))
    assert batch["video"].shape == (20, 8, 8, 16, 3)
    assert (np.diff(batch["actions"]) % 3 == 1).all()
    # Clips of 4: two in each of the three episodes of 9, 10, 11 frames; of 5: 1, 2 and 2.
    assert pipeline.test_clips(plays, 6, 4)["video"].shape[0] == 6
    assert pipeline.test_clips(plays, 5, 5)["video"].shape[0] == 5
    with pytest.raises(UserError, match="has 5 clips of 5 frames"):
        pipeline.test_clips(plays, 6, 5)


def test_a_version_can_be_named(plays):
    plays = plays.copy_and_resolve_references()
    plays.name = "tfds:plays:1.2.0"
    assert len(sources.open_split(plays, "train")) == 20


def test_without_an_action_feature_all_actions_are_zero(plays):
    config = plays.copy_and_resolve_references()
    config.action_feature = ""
    assert all((episode["actions"] == 0).all() for episode in contents(config, "train"))


def test_a_model_may_take_no_actions(plays, tmp_path):
    config = plays.copy_and_resolve_references()
    config.num_actions = 0
    sources.prepare(config)
    arena = make_config(tmp_path, num_actions=0)
    sources.check(arena)


def test_too_few_episodes_to_keep_some_for_testing(tmp_path):
    config = prepare_plays(tmp_path, train=4)
    with pytest.raises(UserError, match=r"has no episodes in 'train\[90%:\]'; prepare more, or"):
        sources.prepare(config)


def test_validation_episodes_serve_as_test_episodes(tmp_path):
    config = prepare_plays(tmp_path, train=4, validation=2)
    assert len(contents(config, "train")) == 4
    expected = np.random.default_rng([10, 0]).integers(256, size=(9, 8, 16, 3), dtype=np.uint8)
    np.testing.assert_array_equal(contents(config, "test")[0]["video"], expected)


def test_of_a_single_split_the_last_tenth_is_kept_for_testing(tmp_path):
    config = prepare_plays(tmp_path, train=20)
    lengths = [len(e["video"]) for split in ("train", "test") for e in contents(config, split)]
    assert lengths == list(range(9, 29))
    assert len(contents(config, "test")) == 2
    [file] = record_files(config)
    file.write_bytes(b"")
    with pytest.raises(UserError, match=str(file)):
        contents(config, "test")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"height": 32, "width": 32},
            "'clip' is uint8 [9, 8, 16, 3], but the configuration asks for uint8 [T, 32, 32, 3]",
        ),
        (
            {"video_feature": "video"},
            "has no feature 'video'; it has button, clip, depth, states, ",
        ),
        ({"action_feature": "action"}, "has no feature 'action'"),
        ({"video_feature": "depth"}, "'depth' is float32 [9, 2]"),
        ({"action_feature": "depth"}, "'depth' is float32 [9, 2], but should be one integer"),
        ({"latents": True}, "'clip' is uint8 [9, 8, 16, 3], but the configuration asks for floats"),
        ({"text_tokens": 2, "text_dim": 3}, "has no feature 'text'"),
        (
            {"text_tokens": 2, "text_dim": 3, "text_feature": "depth"},
            "'depth' is float32 [9, 2], but the configuration asks for floats [2, 3]",
        ),
        ({"num_actions": 2}, "actions are 0 to 2, but data.num_actions is 2"),
        ({"frames": 10}, "has 9 frames, but data.frames is 10"),
        ({"name": "tfds:plasy"}, "no dataset 'plasy' prepared in "),
        ({"name": "tfds:plasy"}, "did you mean 'plays'?"),
        ({"name": "tfds:zzz"}, "it holds plays"),
        ({"name": "tfds:plays:2.0.0"}, "did you mean 'plays'?"),
    ],
)
def test_a_dataset_that_does_not_fit_is_named(plays, fields, message):
    config = plays.copy_and_resolve_references()
    config.update(fields)
    with pytest.raises(UserError) as caught:
        sources.prepare(config)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_dataset_without_random_access_is_refused(tmp_path):
    config = prepare_plays(tmp_path, train=2, test=2)
    [info] = tmp_path.glob("plays/**/dataset_info.json")
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match=r"stored as tfrecord.*file_format='array_record'"):
        sources.prepare(config)


WITHOUT_TENSORFLOW = """
import json, sys
import ml_collections

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tensorflow":
            raise ModuleNotFoundError("No module named 'tensorflow'")

sys.meta_path.insert(0, Hide())
from cfpp.data import sources
try:
    sources.prepare(ml_collections.ConfigDict(json.loads(sys.argv[1])))
except sources.UserError as error:
    print(error)
"""


def test_features_that_need_tensorflow_are_an_error_without_it(tmp_path):
    config = prepare_plays(tmp_path, train=2, test=2)
    [file] = tmp_path.glob("plays/**/features.json")
    features = json.loads(file.read_text())
    kind = "tensorflow_datasets.core.features.video_feature.Video"
    shape = {"dimensions": ["-1", "8", "16", "3"]}
    features["featuresDict"]["features"]["clip"] = {
        "pythonClassName": kind,
        "video": {"dtype": "uint8", "encodingFormat": "png", "shape": shape},
    }
    file.write_text(json.dumps(features))
    command = [sys.executable, "-c", WITHOUT_TENSORFLOW, json.dumps(config.to_dict())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "No module named 'tensorflow'; install the package" in done.stdout, done.stderr


# --- Atari


def atari_config(directory, **fields):
    return make_config(
        directory,
        **{
            "name": "atari:Boxing",
            "height": 64,
            "width": 64,
            "num_actions": 18,
            "episodes": 3,
            "episode_frames": 8,
            **fields,
        },
    )


@pytest.fixture(scope="module")
def boxing(tmp_path_factory):
    pytest.importorskip("ale_py")
    config = atari_config(tmp_path_factory.mktemp("boxing"))
    sources.prepare(config)
    return config


def test_gameplay_recorded_twice_is_identical(boxing, tmp_path):
    again = atari_config(tmp_path, name="atari:boxing", episodes=2)
    sources.prepare(again)
    for split, count in (("train", 2), ("test", 64)):
        one, other = contents(boxing, split), contents(again, split)
        assert len(other) == count
        for first, second in zip(one[:count], other, strict=True):
            np.testing.assert_array_equal(first["video"], second["video"])
            np.testing.assert_array_equal(first["actions"], second["actions"])


def test_gameplay_is_varied(boxing):
    train, test = contents(boxing, "train"), contents(boxing, "test")
    assert train[0]["video"].shape == (8, 64, 64, 3)
    assert (train[0]["video"] != test[0]["video"]).any()
    assert {*np.concatenate([episode["actions"] for episode in test])} == set(range(18))
    assert all((np.diff(e["video"].astype(int), axis=0) != 0).any() for e in test)


def test_an_action_leads_to_its_own_frame():
    """Of two sessions that differ in the last action only, the last picture differs only."""
    atari = pytest.importorskip("cfpp.data.atari")
    pictures = []
    for last in (3, 4):  # right, left
        emulator = atari.Emulator("boxing", 64, 64, seed=0)
        emulator.start()
        pictures.append([emulator.step(action) for action in [3, 3, 5, 5, last]])
    same = [(one == other).all() for one, other in zip(*pictures, strict=True)]
    assert same == [True] * 4 + [False]


@pytest.mark.parametrize("game", ["boxing", "ice_hockey", "space_invaders"])
def test_a_game_starts_when_it_begins_to_obey(game):
    """Without skipping, the first effects would come after 64 and 129 emulator frames."""
    atari = pytest.importorskip("cfpp.data.atari")
    emulator = atari.Emulator(game, 64, 64, seed=0)
    pictures = set()
    for action in range(emulator.num_actions):
        emulator.start()
        pictures.add(emulator.step(action).tobytes())
    assert len(pictures) > 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "atari:boxin"}, "ale-py has no game 'boxin'; did you mean 'boxing'?"),
        ({"name": "atari:qqqqqq"}, "ale-py has no game 'qqqqqq'; it has adventure, air_raid"),
        ({"name": "atari:MsPacman"}, "data.num_actions is 18; atari:MsPacman has 9"),
        ({"name": "atari:"}, "ale-py has no game ''"),
    ],
)
def test_a_game_that_cannot_be_recorded_is_named(tmp_path, fields, message):
    pytest.importorskip("ale_py")
    with pytest.raises(UserError) as caught:
        sources.check(atari_config(tmp_path, **fields))
    assert message in str(caught.value)


def test_without_the_emulator_what_is_recorded_can_be_read(boxing, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    sources.prepare(boxing)
    message = r"needs the package ale-py; pip install -c constraints.txt -e '\.\[atari\]' in"
    with pytest.raises(UserError, match=message):
        sources.prepare(atari_config(tmp_path))


def test_games_shorter_than_an_episode_are_an_error(tmp_path, monkeypatch):
    atari = pytest.importorskip("cfpp.data.atari")
    monkeypatch.setattr(atari.Emulator, "over", True)
    with pytest.raises(UserError, match="shorter than an episode of 8 frames"):
        sources.prepare(atari_config(tmp_path))
    assert not os.listdir(tmp_path / "atari_dataset" / "boxing-64x64-3x8")
