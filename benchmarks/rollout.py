"""Measures a whole network: streaming, and a teacher-forced training step.

    python benchmarks/rollout.py                 # Wan 1.3B on a GPU or TPU, bfloat16
    python benchmarks/rollout.py --size=20m      # what a CPU can do, float32

The network has random parameters, and no VAE. It streams frame by frame by `Player`, two steps a
frame after a longer first one, its window the whole clip. A training step is stage 1's with AdamW,
at batch 1. The peak of memory is the device's, or the whole process's on a CPU.

Writes `benchmarks/results/rollout_SIZE_PLATFORM.json`.
"""

import argparse
import time

import flax.linen as nn
import jax
import measuring
import ml_collections
import numpy as np

from cfpp.attention.dispatch import IMPLEMENTATIONS
from cfpp.errors import exit_on_user_error
from cfpp.models.network import Network
from cfpp.rollout.generate import Rollout
from cfpp.rollout.sampler import consistency
from cfpp.rollout.stream import Player
from cfpp.stages import ar_diffusion
from configs import stage1

VIDEO_FRAMES = 4  # in one latent frame of Wan's VAE

# What differs from Wan 2.1 1.3B: fields of `config.model`, frames of a clip, tokens of its text.
SMALL = dict(
    dim=384, ffn_dim=1536, heads=6, layers=8, height=32, width=32, text_dim=64,
    dtype="float32", remat="save_attention",
)  # fmt: skip
SIZES = {"wan_1_3b": ({}, 21, 512), "20m": (SMALL, 16, 16)}


def job(size: str, attention: str) -> ml_collections.ConfigDict:
    """The config of a stage-1 job of this size."""
    model, frames, _ = SIZES[size]
    config = stage1.get_config("wan_1_3b")
    config.model.update(model | {"attention": attention})
    config.pattern.window = frames
    return config


def text(size: str, model: ml_collections.ConfigDict) -> jax.Array:
    """Random text embeddings of one clip."""
    return jax.random.normal(jax.random.key(1), (1, SIZES[size][2], model.text_dim))


def video(model: ml_collections.ConfigDict, frames: int) -> np.ndarray:
    """Random latents of one clip."""
    shape = (1, frames, model.height, model.width, model.channels)
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def stream(size: str, attention: str, first_steps: int) -> dict:
    """Streams a clip twice, and times the second: the first one compiles."""
    config = job(size, attention)
    network = Network.create(config.model, config.pattern).without_unrolling()
    init = lambda rng: network.for_inference(nn.meta.unbox(network.init(rng)))
    params = jax.jit(init)(jax.random.key(0))
    rollout = Rollout(network, consistency(2, shift=5.0, first_steps=first_steps))
    condition = {"text": text(size, config.model)}
    for _ in range(2):
        player = Player(rollout, params, video(config.model, 0), condition, jax.random.key(2))
        player.wait()
        times = [time.perf_counter()]
        for _ in range(SIZES[size][1]):
            player.play()  # returns when the frame is there
            times.append(time.perf_counter())
    first, *later = np.diff(times)
    return {
        "first_steps": first_steps,
        "first_frame_seconds": first,
        "later_frame_seconds": np.mean(later),
        "last_frame_seconds": later[-1],
        "video_frames_per_second": VIDEO_FRAMES / np.mean(later),
    }


def training_step(size: str, attention: str) -> dict:
    """The time of a step of stage 1, and what memory it takes."""
    config = job(size, attention)
    stage = ar_diffusion.build(config)
    state = jax.jit(lambda rng: nn.meta.unbox(stage.init(rng, {})))(jax.random.key(0))
    batch = {"video": video(config.model, SIZES[size][1]), "text": text(size, config.model)}
    rng = jax.random.key(3)
    step = jax.jit(stage.step, donate_argnums=0).lower(state, batch, rng).compile()
    analysis = step.memory_analysis()
    carry = [state]

    def run():
        carry[0], metrics = step(carry[0], batch, rng)
        return metrics

    seconds = measuring.seconds(run)
    return {
        "seconds": seconds,
        "state_gib": analysis.argument_size_in_bytes / 2**30,
        "temporary_gib": analysis.temp_size_in_bytes / 2**30,
        "peak_gib": measuring.peak_gib(),
    }


def main() -> None:
    """Reads the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    platform = jax.default_backend()
    default = "20m" if platform == "cpu" else "wan_1_3b"
    parser.add_argument("--size", choices=SIZES, default=default)
    parser.add_argument("--attention", choices=("auto", *IMPLEMENTATIONS), default="auto")
    parser.add_argument("--first-steps", type=int, default=4, help="of the first frame")
    options = parser.parse_args()

    results = measuring.machine() | {"size": options.size, "attention": options.attention}
    for part, measure in {
        "training_step": lambda: training_step(options.size, options.attention),
        "stream": lambda: stream(options.size, options.attention, options.first_steps),
    }.items():
        results[part] = measure()
        print(f"{part}:", measuring.rounded(results[part]))
        measuring.write(f"rollout_{options.size}_{platform}", results)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
