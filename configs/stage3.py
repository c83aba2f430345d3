"""Stage 3, asymmetric distribution matching on self-rollouts.

    python -m cfpp.main --config=configs/stage3.py --workdir=runs/stage3 \
        --config.init_from.student=runs/stage2 --config.init_from.real=runs/stage1

`:wan_1_3b,teacher=14b` takes Wan 2.1 14B as the real score; the critic stays a 1.3B model.
"""

import ml_collections

from configs import common


def get_config(arg: str = ""):
    options = common.parse(arg, teachers=("14b",))
    config = common.base("dmd", options)
    config.steps = 70
    config.optimizer = common.optimizer("adamw", 2e-4)
    config.critic_optimizer = common.optimizer("adamw", 5e-4)
    config.optimizer.b1 = config.critic_optimizer.b1 = 0.0
    config.critic_steps = 3  # critic steps a student step
    config.ema.decay = 0.9
    config.given = 1  # real frames that a self-rollout starts from
    config.update(common.schedule(options))
    config.score_shift = config.shift  # of the noise level at which the scores are compared
    config.score_sigma = (0.02, 0.98)  # its range
    config.sigma_floor = 0.3  # of the critic's loss
    config.real_score = "causal"  # or 'bidirectional'
    config.history_gradient = "none"  # or 'straight_through'
    config.init_from.student = "runs/stage2"
    config.real_model = ml_collections.ConfigDict()  # where it differs from config.model
    config.init_from.real = "runs/stage1"
    config.init_from.critic = ""  # where the critic starts; '' is the real score
    if options.world == "wan_1_3b":
        # Published as 1,000 iterations, every fifth of which is a step of the student's too, and an
        # average from iteration 200 on.
        config.steps, config.critic_steps = 200, 5
        config.optimizer = common.wan_optimizer()
        config.critic_optimizer = common.wan_optimizer(4e-7)
        config.ema.decay, config.ema.start = 0.99, 40
        config.given = 0
        config.sigma_floor = 0.0
        config.real_score = "bidirectional"
        # The public code's 3, which it applies as cond + 3 (cond - uncond).
        config.guidance = 4.0
        config.init_from.real = "runs/wan"
    if options.teacher:
        config.real_model.update(common.WAN_SIZES[options.teacher])
        config.init_from.real = f"runs/wan_{options.teacher}"
        config.init_from.critic = "runs/wan"
    return config
