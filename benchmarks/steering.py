"""Draws where a model goes: one first frame, and in each row one action, held.

    python benchmarks/steering.py runs/atari --actions=0,2,3,4,5 --out=steering.png

The first frame is a held-out episode's; all rows draw the same noise.
"""

import argparse
import pathlib

import jax
import measuring  # noqa: F401  finds the package where it is not installed
import numpy as np

from cfpp import media
from cfpp.data import pipeline
from cfpp.evaluate import pictures
from cfpp.rollout import generate
from cfpp.rollout.stream import Player
from cfpp.train import checkpoint


def main() -> None:
    """Reads the command line, streams and draws."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a working directory or an export")
    parser.add_argument("--data", help="the data's directory, where it is no longer the config's")
    parser.add_argument("--actions", required=True, help="numbers, one a row: 0,2,3")
    parser.add_argument("--episode", type=int, default=0, help="held out, whose first frame it is")
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a .png file")
    options = parser.parse_args()

    config, params = checkpoint.load_model(options.model)
    if options.data:
        config.data.directory = options.data
    held = np.array([int(action) for action in options.actions.split(",")], np.int32)
    clip = pipeline.test_clips(config.data, options.episode + 1, 1)
    first = clip["video"][-1:].repeat(len(held), 0)  # [rows, 1, H, W, 3]
    given = clip["actions"][-1:].repeat(len(held), 0)
    key = jax.random.key(options.seed)
    player = Player(generate.for_stage(config), params, first, {"actions": given}, key)
    pieces = [first]
    while sum(piece.shape[1] for piece in pieces) <= options.frames:
        pieces.append(player.play(held[:, None].repeat(player.chunk, 1)))
    video = np.concatenate(pieces, 1)[:, : 1 + options.frames]

    symbol = pictures.action_symbols(config.data.name, config.data.num_actions)
    strips = [
        media.Strip(symbol(action), "held", row, False)
        for action, row in zip(held, video, strict=True)
    ]
    scale = max(1, round(pictures.STRIP_PIXELS / video.shape[2]))
    heads = ["0\ngiven", *map(str, range(1, 1 + options.frames))]
    media.write_image(options.out, media.film_strips(strips, heads, scale, "frame", given=1))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
