"""Records a dataset, so that training finds it ready.

    python -m cfpp.data.prepare --data=atari:Boxing --directory=DIR --episodes=256

Training records what is missing by itself; this command does it beforehand, or for many runs. The
same numbers in the configuration (`data.episodes`, `data.episode_frames`, ...) find the recording:
256 are those of `configs/stage1.py:atari`, 2048 those of `configs/stage1.py`.
"""

import ml_collections

from cfpp.data import arena, sources
from cfpp.errors import ArgumentParser, UserError, exit_on_user_error


def main() -> None:
    """Runs the command."""
    parser = ArgumentParser("cfpp.data.prepare", __doc__)
    parser.add_argument("--data", required=True, help="arena or atari:<game>, as atari:Boxing")
    parser.add_argument("--directory", default="", help="where; ~/tensorflow_datasets if not given")
    parser.add_argument("--episodes", type=int, default=2048, help="train episodes (%(default)s)")
    parser.add_argument(
        "--episode_frames", type=int, default=64, help="frames an episode (%(default)s)"
    )
    parser.add_argument("--height", type=int, help="of pictures (arena 32, atari 64)")
    parser.add_argument("--width", type=int, help="of pictures (arena 32, atari 64)")
    flags = parser.parse_args()
    if flags.data.startswith("tfds:"):
        raise UserError(f"{flags.data} is prepared by TFDS, not here; give arena or atari:<game>")
    size = arena.SIZE if flags.data == "arena" else 64
    data = ml_collections.ConfigDict(
        {
            "name": flags.data,
            "directory": flags.directory,
            "frames": flags.episode_frames,
            "height": size if flags.height is None else flags.height,
            "width": size if flags.width is None else flags.width,
            "channels": 3,
            "latents": False,
            "num_actions": sources.num_actions(flags.data),
            "text_tokens": 0,
            "text_dim": 0,
            "video_feature": "video",
            "action_feature": "actions",
            "episodes": flags.episodes,
            "episode_frames": flags.episode_frames,
        }
    )
    sources.prepare(data)
    episodes = sources.open_split(data, "train")
    video = episodes[0]["video"]
    print(
        f"{len(episodes)} train episodes of {len(video)} frames {data.height}x{data.width}, "
        f"{data.num_actions} actions, in {episodes.directory}"
    )


if __name__ == "__main__":
    with exit_on_user_error():
        main()
