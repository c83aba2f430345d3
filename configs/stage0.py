"""Stage 0, the bidirectional base: flow matching on whole clips.

python -m cfpp.main --config=configs/stage0.py --workdir=runs/stage0
"""

from configs import common


def get_config(arg: str = ""):
    options = common.parse(arg)
    config = common.base("bidirectional", options)
    # All frames see all.
    config.pattern.chunk = config.pattern.first_chunk = config.pattern.window = None
    config.optimizer = common.muon()
    config.sigma_floor = 0.3  # noise levels below weigh less
    config.given_rate = 0.5  # how often the first frame is given
    config.drop_rate = 0.0  # how often the condition is dropped, for guidance
    del config.guidance  # the base is sampled as it is
    del config.frozen_dtype  # no network only lends its output
    config.init_from.base = ""  # a model to start from, or ''
    if options.world == "wan_1_3b":
        config.steps = 20_000
        config.optimizer = common.wan_optimizer()
        config.sigma_floor = 0.0
        config.given_rate, config.drop_rate = 0.0, 0.1
    return config
