"""Draws where a model goes: one first frame, and in each row one action, held.

    python benchmarks/steering.py runs/atari --actions=0,2,3,4,5 --out=steering.png

The first frame is a held-out episode's; all rows draw the same noise.
"""

import argparse
import pathlib

import jax
import numpy as np

from cfpp import media
from cfpp.data import pipeline
from cfpp.evaluate import pictures
from cfpp.rollout import generate
from cfpp.rollout.__main__ import parse_actions
from cfpp.train import stored


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

    model = stored.find(options.model)
    network, config, params = model.network(), model.config, model.load()
    if options.data:
        config.data.directory = options.data
    clip = pipeline.test_clips(config.data, options.episode + 1, 1)
    first, given = clip["video"][-1:], clip["actions"][-1:]  # [1, 1, H, W, 3], [1, 1]
    rollout, key = generate.for_stage(network, config), jax.random.key(options.seed)

    def video(action: int) -> np.ndarray:
        actions = np.pad(given, ((0, 0), (0, options.frames)), constant_values=action)
        later = rollout.clip(params, first, {"actions": actions}, key, options.frames)
        return np.concatenate([first, later], 1)[0]

    held = parse_actions(options.actions, network.dit.num_actions)
    symbol = pictures.action_symbols(config.data.name, config.data.num_actions)
    strips = [media.Strip(symbol(action), "held", video(action)) for action in held]
    scale = max(1, round(pictures.STRIP_PIXELS / config.data.height))
    heads = ["0\ngiven", *map(str, range(1, 1 + options.frames))]
    media.write_image(options.out, media.film_strips(strips, heads, scale, "frame", given=1))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
