"""Stage 2, causal consistency distillation: one online teacher step gives the target.

    python -m cfpp.main --config=configs/stage2.py --workdir=runs/stage2 \
        --config.init_from.teacher=runs/stage1
"""

from configs import common


def get_config(arg: str = ""):
    options = common.parse(arg)
    config = common.base("consistency", options)
    config.steps = 320
    config.optimizer = common.muon(0.005, 5e-4)
    config.draws = 1  # noisy draws that share a clean pass
    config.grid_steps = 12  # N of the solver grid, at the end
    config.grid_doublings = 0  # how often it has doubled by then
    config.update(common.schedule(options))  # the grid has its shift too
    config.solver = "euler"  # or 'heun'
    config.distance = "mse"  # or 'pseudo_huber'
    config.ema.decay = 0.9
    config.init_from.teacher = "runs/stage1"
    if options.world == "arena":
        config.batch_size, config.ema.decay = 4, 0.95
        config.grid_steps = 8
    if options.world == "wan_1_3b":
        config.steps = 5000
        config.optimizer = common.wan_optimizer()
        config.grid_steps = 48
        config.guidance = 3.0
        config.ema.decay = 0.99  # it gives the target, from the first step on
    else:
        # What a coarse grid learns soon, a finer one refines (docs/experiments.md).
        config.grid_doublings = 2
    return config
