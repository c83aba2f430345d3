"""Stage 1, the many-step autoregressive teacher: teacher forcing.

    python -m cfpp.main --config=configs/stage1.py --workdir=runs/stage1 \
        --config.init_from.base=runs/stage0
"""

import ml_collections

from configs import common


def get_config(arg: str = ""):
    options = common.parse(arg)
    config = common.base("ar_diffusion", options)
    config.optimizer = common.muon()
    config.draws = 1  # noisy draws that share a clean pass
    config.sigma_floor = 0.3  # noise levels below weigh less
    config.bell_weight = False  # whether those near 1/2 weigh more, and 0 and 1 nothing
    # How often the model makes the history that it is forced on, and from which noise levels.
    config.resample = ml_collections.ConfigDict({"rate": 0.0, "sigma": (0.3, 0.8)})
    config.drop_rate = 0.0  # how often the condition is dropped, for guidance
    del config.frozen_dtype  # no network only lends its output
    config.init_from.base = ""  # the stage-0 model to start from, or ''
    if options.world == "wan_1_3b":
        config.steps = 20_000
        config.optimizer = common.wan_optimizer()
        config.sigma_floor, config.bell_weight = 0.0, True
        config.drop_rate = 0.1
        config.ema.decay = 0.0  # published without an average
    else:
        # In small worlds more steps do more than larger batches, at first (docs/experiments.md).
        config.batch_size, config.ema.decay = 4, 0.995
        config.resample.rate = 0.5
    return config
