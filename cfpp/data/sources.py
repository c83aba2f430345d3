"""Where episodes come from: the arena, an Atari game, or any prepared TFDS dataset.

A source is named `arena`, `atari:<game>` or `tfds:<name>`; the first two are recorded by `prepare`
if they are missing, RGB videos with actions, while the third may hold latents, and texts. All are
read as TFDS datasets of `array_record` files, without TensorFlow.
"""

import contextlib
import difflib
import importlib.util
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_collections
import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from google.protobuf import json_format

from cfpp import paths
from cfpp.data import arena, recording
from cfpp.data.arena_dataset import arena_dataset_dataset_builder
from cfpp.data.atari_dataset import atari_dataset_dataset_builder
from cfpp.errors import UserError, how_to_install, one_line

# What a stored configuration must have for its data to be read.
FIELDS = tuple(
    f"data.{name}"
    for name in (
        "name", "directory", "frames", "height", "width", "channels", "latents", "num_actions",
        "text_tokens", "text_dim", "video_feature", "action_feature", "text_feature", "episodes",
        "episode_frames",
    )
)  # fmt: skip


# How much is recorded, and of which size.
RECORDED = ("episodes", "episode_frames", "height", "width")


class MissingError(UserError):
    """A dataset that is not there, or that no source gives."""


class Episodes:
    """Random access to the episodes of a split, checked against the configuration as they are read.

    An episode is {'video': [T, height, width, channels], 'actions': int32 [T]}, the video of uint8
    or, of latents, bfloat16; with 'text' bfloat16 [text_tokens, text_dim] where data_config asks
    for it; and 'states' where the world has them. actions[t] leads from frame t-1 to frame t.
    """

    def __init__(
        self,
        dataset: tfds.core.DatasetBuilder,
        split: str,
        data_config: ml_collections.ConfigDict,
    ):
        """Opens a split.

        Args:
          dataset: a prepared one.
          split: a TFDS split.
          data_config: the data part of the configuration.

        Raises:
          UserError: if it has no such episodes, or stores them otherwise.
        """
        self.directory = directory = Path(dataset.data_dir)
        self._video = data_config.video_feature
        self._actions = data_config.action_feature
        if not data_config.name.startswith("tfds:"):
            self._video, self._actions = "video", "actions"
        self._latents = data_config.latents
        self._picture = (data_config.height, data_config.width, data_config.channels)
        self._text = data_config.text_feature if data_config.text_tokens else ""
        self._embedding = (data_config.text_tokens, data_config.text_dim)
        self._num_actions = data_config.num_actions
        self._has_states = data_config.name == "arena"  # a feature of others may be anything
        info = dataset.info
        if not info.splits[split].num_examples:
            raise UserError(
                f"{directory} has no episodes in '{split}'; prepare more, or a split 'test' too"
            )
        missing = {self._video, self._actions, self._text} - {"", *info.features}
        if missing:
            raise UserError(
                f"{directory} has no feature '{missing.pop()}'; "
                f"it has {', '.join(sorted(info.features))}"
            )
        self._files = info.splits[split].file_instructions
        try:
            self._source = dataset.as_data_source(split)
        except NotImplementedError as error:
            raise UserError(
                f"{directory} is stored as {info.file_format.value}, which has no random "
                "access; prepare it with file_format='array_record'"
            ) from error

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        try:
            record = self._source[index]
        except (RuntimeError, ValueError) as error:  # of array_record; of an empty record
            raise UserError(
                f"cannot read record {index} from {self._file(index)}: {one_line(error)}; "
                f"delete {self.directory} and prepare the dataset again"
            ) from error
        video = np.asarray(record[self._video])
        frames = video.shape[0] if video.ndim else 0
        actions = np.zeros(frames, np.int32)
        if self._actions:
            actions = np.asarray(record[self._actions])
        self._check(index, video, actions)
        episode = {"video": video, "actions": actions.astype(np.int32)}
        if self._latents:
            episode["video"] = self._rounded(index, self._video, video)
        if self._text:
            text = np.asarray(record[self._text])
            self._check_text(index, text)
            episode["text"] = self._rounded(index, self._text, text)
        if self._has_states:
            episode["states"] = record["states"]
        return episode

    def _check(self, index: int, video: np.ndarray, actions: np.ndarray) -> None:
        where = self._where(index)
        is_kind = _is_float(video) if self._latents else video.dtype == np.uint8
        if not is_kind or video.shape[1:] != self._picture or not len(video):
            height, width, channels = self._picture
            kind, more = ("floats", ", data.channels") if self._latents else ("uint8", "")
            wanted = f"{kind} [T, {height}, {width}, {channels}]"
            fields = f"data.latents, data.height, data.width{more}"
            raise self._unlike(index, self._video, video, wanted, fields)
        if actions.shape != video.shape[:1] or not np.issubdtype(actions.dtype, np.integer):
            raise UserError(
                f"{where}: '{self._actions}' is {actions.dtype} {list(actions.shape)}, but should "
                f"be one integer for each of the {len(video)} frames"
            )
        if self._num_actions and not 0 <= actions.min() <= actions.max() < self._num_actions:
            raise UserError(
                f"{where}: actions are {actions.min()} to {actions.max()}, but data.num_actions is "
                f"{self._num_actions}; they should be 0 to {self._num_actions - 1}"
            )

    def _check_text(self, index: int, text: np.ndarray) -> None:
        if not _is_float(text) or text.shape != self._embedding:
            wanted = f"floats {list(self._embedding)}"
            fields = "data.text_tokens and data.text_dim"
            raise self._unlike(index, self._text, text, wanted, fields)

    def _unlike(
        self, index: int, name: str, array: np.ndarray, wanted: str, fields: str
    ) -> UserError:
        return UserError(
            f"{self._where(index)}: '{name}' is {array.dtype} {list(array.shape)}, but the "
            f"configuration asks for {wanted}; set {fields}, or prepare the dataset like that"
        )

    def _rounded(self, index: int, name: str, array: np.ndarray) -> np.ndarray:
        rounded = array.astype(ml_dtypes.bfloat16)
        if not np.isfinite(rounded).all():
            raise UserError(
                f"{self._where(index)}: '{name}' has numbers that are not finite; prepare it again"
            )
        return rounded

    def _where(self, index: int) -> str:
        return f"episode {index} of {self.directory}"

    def _file(self, index: int) -> str:
        for file in self._files:
            if index < file.take:
                return file.filename
            index -= file.take
        raise IndexError(index)


def _is_float(array: np.ndarray) -> bool:
    # To NumPy, bfloat16 is none.
    return np.issubdtype(array.dtype, np.floating) or array.dtype == ml_dtypes.bfloat16


def check(data_config: ml_collections.ConfigDict) -> None:
    """Checks what can be told before anything is written.

    Raises:
      UserError: the configuration names no data source, none on a disk, or one that cannot be
        recorded as it says.
    """
    _root(data_config)
    if not data_config.name:
        raise UserError(
            "config.data.name is empty; give tfds:<dataset>, one that you have prepared "
            "(docs/data.md); python -m cfpp.aot compiles a job without data"
        )
    recorded = _recording(data_config)
    if recorded and not recorded.directory.exists():
        actions = num_actions(data_config.name)
        if data_config.num_actions not in (0, actions):  # 0: of a model that takes none
            raise UserError(
                f"data.num_actions is {data_config.num_actions}; {data_config.name} has {actions}"
            )


def prepare(data_config: ml_collections.ConfigDict) -> None:
    """Records the dataset if it is missing (arena, atari), and reads an episode of each split.

    Recording goes to a folder of another name, which is renamed when it is complete: what was
    interrupted is never taken for a dataset.

    Args:
      data_config: the data part of the configuration.

    Raises:
      UserError: if the dataset cannot be had, or is not what the configuration says.
    """
    check(data_config)
    recorded = _recording(data_config)
    if recorded and not recorded.directory.exists():
        _record(data_config, recorded)
    for split in ("train", "test"):
        check_length(data_config, open_split(data_config, split)[0], f"the first {split} episode")


def recorded_clips(data_config: ml_collections.ConfigDict, frames: int) -> int | None:
    """How many held-out clips a recording has or will have; None of a dataset made elsewhere."""
    recorded = _recording(data_config)
    if recorded is None:
        return None
    return recorded.config.split_sizes()["test"] * (recorded.config.episode_frames // frames)


def open_split(data_config: ml_collections.ConfigDict, split: str) -> Episodes:
    """Opens the episodes of a prepared dataset.

    A `tfds:` dataset without a test split is split here: its validation split or, without one, the
    last tenth of its training episodes is kept for testing.

    Args:
      data_config: the data part of the configuration.
      split: 'train' or 'test'.

    Returns:
      The episodes; a sequence that can be pickled.

    Raises:
      UserError: if the dataset is missing or cannot be read.
    """
    recorded = _recording(data_config)
    if recorded is None:
        dataset = _find_dataset(data_config)
    elif recorded.directory.exists():
        dataset = _open_dataset(recorded.directory)
    else:
        raise MissingError(
            f"{data_config.name} is not recorded in {recorded.directory}; run python -m "
            f"cfpp.data.prepare --data={data_config.name} --directory={_root(data_config)} "
            + " ".join(f"--{name}={data_config[name]}" for name in RECORDED)
        )
    splits = dataset.info.splits
    if "train" not in splits:
        raise UserError(
            f"{dataset.data_dir} has no split 'train'; it has {', '.join(splits) or 'none'}"
        )
    if split == "test" and "test" not in splits and "validation" in splits:
        split = "validation"
    elif split not in splits or (split == "train" and not {"test", "validation"} & {*splits}):
        split = {"train": "train[:90%]", "test": "train[90%:]"}[split]
    return Episodes(dataset, split, data_config)


def check_length(data_config: ml_collections.ConfigDict, episode: dict, where: str) -> None:
    """Raises UserError if an episode is shorter than a window of data.frames."""
    if len(episode["video"]) < data_config.frames:
        raise UserError(
            f"{where} of {data_config.name} has {len(episode['video'])} frames, but data.frames is "
            f"{data_config.frames}; give a smaller one, or longer episodes"
        )


def _root(data_config: ml_collections.ConfigDict) -> Path:
    root = str(data_config.directory or tfds.core.constants.DATA_DIR)
    if paths.is_remote(root):
        raise UserError(
            f"config.data.directory is {root}, but records are read from disks only; give a "
            "folder, on a shared disk or on each host's own"
        )
    return Path(root).expanduser()


def num_actions(name: str) -> int:
    """The number of actions of `arena` or `atari:<game>`."""
    if name == "arena":
        return arena.NUM_ACTIONS
    if not name.startswith("atari:"):
        raise _unknown(name)
    if importlib.util.find_spec("ale_py") is None:
        raise UserError(f"recording {name} needs the package ale-py; {how_to_install('atari')}")
    from cfpp.data import atari

    game, games = _game(name), atari.games()
    if game not in games:
        suggestion = _suggest(game, games) or f"; it has {', '.join(games)}"
        raise UserError(f"ale-py has no game '{game}'{suggestion}")
    return atari.num_actions(game)


def _game(name: str) -> str:
    """The game of `atari:<game>` as ale-py writes it: MsPacman is ms_pacman."""
    return tfds.core.naming.camelcase_to_snakecase(name.removeprefix("atari:"))


class _Recording(NamedTuple):
    """A dataset that is recorded here: what records it, what that is to record, and where to."""

    builder: type[recording.EpisodeBuilder]
    config: recording.RecordingConfig
    directory: Path


def _recording(data_config: ml_collections.ConfigDict) -> _Recording | None:
    """The recording of the configured arena or game; None of a dataset made elsewhere.

    Raises:
      UserError: there is no such source, or no such recording can be made.
    """
    if data_config.name == "tfds:":
        raise _unknown(data_config.name)
    if data_config.name.startswith("tfds:"):
        return None
    for field in RECORDED:
        if data_config[field] < 1:
            raise UserError(f"data.{field} is {data_config[field]}; give at least 1")
    size = {"episodes": data_config.episodes, "episode_frames": data_config.episode_frames}
    picture = {"height": data_config.height, "width": data_config.width}
    if data_config.name == "arena":
        if set(picture.values()) != {arena.SIZE}:
            raise UserError(
                f"data.height and data.width are {data_config.height} and {data_config.width}; "
                f"the arena's pictures are {arena.SIZE} by {arena.SIZE}"
            )
        builder = arena_dataset_dataset_builder.Builder
        config = arena_dataset_dataset_builder.ArenaConfig(**size)
    elif data_config.name.startswith("atari:"):
        builder = atari_dataset_dataset_builder.Builder
        config = atari_dataset_dataset_builder.AtariConfig(
            game=_game(data_config.name), **picture, **size
        )
    else:
        raise _unknown(data_config.name)
    directory = _root(data_config) / builder.name / config.name / str(builder.VERSION)
    return _Recording(builder, config, directory)


def _unknown(name: str) -> MissingError:
    return MissingError(
        f"no data source '{name}'{_suggest(name, ['arena'])}; "
        "give arena, atari:<game> or tfds:<dataset>"
    )


def _record(data_config: ml_collections.ConfigDict, recorded: _Recording) -> None:
    """Records a dataset; its progress bar goes to stderr."""
    root = _root(data_config)
    tfds.disable_progress_bar()  # its bars know no totals
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # it warns of configurations that are not its own
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it speaks of downloads
            recorded.builder(
                config=recorded.config, data_dir=root, file_format="array_record"
            ).download_and_prepare()
    except (OSError, RuntimeError) as error:  # RuntimeError: array_record cannot write
        if recorded.directory.exists():
            return  # another process has recorded the same at the same time
        raise UserError(
            f"cannot record {data_config.name} in {root}: {one_line(error)}; "
            "give a directory with room and the right to write (data.directory)"
        ) from error
    finally:
        logging.set_verbosity(verbosity)


def _find_dataset(data_config: ml_collections.ConfigDict) -> tfds.core.DatasetBuilder:
    """A prepared dataset `tfds:<name>`, `<name>/<config>` or with `:<version>`."""
    root, name = _root(data_config), data_config.name.removeprefix("tfds:")
    try:
        with _readable(f"dataset '{name}' in {root}"):
            return tfds.core.read_only_builder.builder_from_files(name, data_dir=root)
    except tfds.core.DatasetNotFoundError as error:
        present = sorted(
            str(info.parent.parent.relative_to(root)) for info in root.glob("*/**/features.json")
        )
        suggestion = _suggest(name, present) or f"; it holds {', '.join(present) or 'none'}"
        raise MissingError(f"no dataset '{name}' prepared in {root}{suggestion}") from error


def _open_dataset(directory: Path) -> tfds.core.DatasetBuilder:
    with _readable(f"dataset in {directory}"):
        return tfds.builder_from_directory(directory)


@contextlib.contextmanager
def _readable(dataset: str) -> Iterator[None]:
    """Turns what TFDS raises for metadata that it cannot read into a UserError."""
    try:
        yield
    except tfds.core.DatasetNotFoundError:
        raise
    except (OSError, ValueError, json_format.Error) as error:
        raise UserError(
            f"cannot read the {dataset}: {one_line(error)}; delete it and prepare it again"
        ) from error
    except ImportError as error:
        raise UserError(
            f"cannot read the {dataset}: {one_line(error)}; install the package, or prepare the "
            "dataset with Tensor features, which need none"
        ) from error


def _suggest(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean '{near[0]}'?" if near else ""
