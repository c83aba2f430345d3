"""The whole recipe on one machine: data, stages 0 to 3, evaluation.

    python -m cfpp.main --config=configs/quickstart.py --workdir=runs/quickstart

14 to 16 minutes on two slow CPU cores (docs/quickstart.md). Variants:
`configs/quickstart.py:smoke` is the same in miniature, `:atari` the same on Boxing, `:atari_gpu`
that for minutes of a GPU, `:long` trains for an hour, with the bidirectional base as stage 3's real
score.

All stages share one `data`, one `model` and one `mesh`: `--config.data.workers=2`,
`--config.model.attention=xla`, `--config.mesh.fsdp=2`.
"""

import ml_collections

from configs import common, stage0, stage1, stage2, stage3

JOBS = {"stage0": stage0, "stage1": stage1, "stage2": stage2, "stage3": stage3}

# Training steps of the four stages.
STEPS = {
    "": (150, 1700, 700, 60),
    "smoke": (4, 6, 4, 2),
    "atari": (100, 1800, 350, 40),
    "atari_gpu": (2000, 7700, 1500, 300),
    "long": (8000, 7500, 1200, 200),
}
# The argument of the stages' own configs, where it is another.
WORLDS = {"long": "", "atari_gpu": "atari"}


def get_config(arg: str = ""):
    if arg not in STEPS:
        raise ValueError(f"config argument {arg!r} is none of {', '.join(filter(None, STEPS))}")
    config = ml_collections.ConfigDict()
    config.jobs = tuple(JOBS)
    world = WORLDS.get(arg, arg)
    for (name, module), steps in zip(JOBS.items(), STEPS[arg], strict=True):
        job = module.get_config(world)
        job.steps = steps
        # Four a stage, the fourth after the last step: one compiles for some seconds, and the three
        # others of all stages together take some 5 s of the default run.
        job.sample_every = 0 if arg == "smoke" else -(-steps // 4)
        if arg == "smoke":
            job.optimizer = common.optimizer("adamw", 1e-3)  # compiles faster than Muon
        if arg == "atari_gpu":
            job.batch_size = 16
            job.log_every, job.save_every = 100, 1000  # of some dozens a second
        config[name] = job
    # The very same objects: to set a field of one sets it for all.
    for group in ("data", "model", "mesh"):
        config[group] = config.stage0[group]
        for name in JOBS:
            config[name][group] = config[group]
    # Paths that start with '..' are relative to the job's own directory.
    config.data.directory = "../data"
    config.stage1.init_from.base = "../stage0"
    config.stage2.init_from.teacher = "../stage1"
    config.stage3.init_from.student = "../stage2"
    config.stage3.init_from.real = "../stage1"
    if arg == "long":
        # What smaller batches gain in the default run goes in longer ones.
        config.stage1.batch_size, config.stage1.ema.decay = 8, 0.99
        config.stage2.batch_size, config.stage2.ema.decay = 8, 0.9
        config.stage2.grid_steps = 24  # its sizes: 6, 12, 24
        config.stage3.real_score = "bidirectional"
        config.stage3.init_from.real = "../stage0"
    if arg == "atari_gpu":
        config.data.episodes = 640
        config.data.workers = 4  # to read takes 13 ms a batch, and a step less than 20
        config.model.update({"dim": 256, "ffn_dim": 1024, "heads": 4, "layers": 6, "unroll": 6})
        config.stage1.ema.decay = 0.998

    config.evaluate = ml_collections.ConfigDict()
    config.evaluate.episodes = 64  # held out
    config.evaluate.frames = 12  # generated
    config.evaluate.context = 1  # given before them
    config.evaluate.starts = 8  # first frames from which directions are sampled
    config.evaluate.samples = 64  # of each start
    config.evaluate.probe_steps = 200  # of the network that tells actions
    config.evaluate.seed = 0
    if world == "atari":
        config.evaluate.probe_steps = 600
    if arg == "smoke":
        config.evaluate.update({"episodes": 4, "starts": 2, "samples": 4, "probe_steps": 10})
    return config
