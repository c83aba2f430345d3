"""Stage 2', causal ODE distillation: the baseline that consistency distillation replaces.

    python -m cfpp.main --config=configs/stage2_ode.py --workdir=runs/stage2_ode \
        --config.init_from.teacher=runs/stage1
"""

from configs import common


def get_config(arg: str = ""):
    options = common.parse(arg)
    config = common.base("ode", options)
    config.steps = 320
    config.optimizer = common.optimizer("adamw", 1e-3)
    config.grid_steps = 16  # N of the solver grid, on which all positions lie
    config.update(common.schedule(options))  # the grid has its shift too
    del config.first_positions  # the student learns from the points of one schedule
    config.solver = "euler"  # or 'heun'
    config.ema.decay = 0.9
    config.init_from.teacher = "runs/stage1"
    if options.world == "wan_1_3b":
        config.steps = 5000
        config.optimizer = common.wan_optimizer()
        config.grid_steps = 48
        config.optimizer.b1 = 0.9
        config.positions = (1000.0, 750.0, 500.0, 250.0)
        config.guidance = 6.0  # of the teacher's paths
        config.ema.decay = 0.0  # published without an average
    return config
