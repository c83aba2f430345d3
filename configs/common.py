"""What the configs of all stages share: worlds (data and network sizes) and the fields of a run.

A config's argument is a comma-separated list: at most one world (`arena`, `atari`), and options
`chunk=N`, `smoke`. Stage files add their own fields.
"""

import ml_collections
from ml_collections import config_dict

ConfigDict = ml_collections.ConfigDict

WORLDS = ("arena", "atari")


def parse(arg: str) -> ConfigDict:
    """Reads a config's argument.

    Returns:
      world, chunk (frames generated at once) and smoke (the job in miniature).

    Raises:
      ValueError: a word that is none of these.
    """
    options = ConfigDict({"world": "arena", "chunk": 1, "smoke": False})
    worlds = []
    for word in filter(None, arg.split(",")):
        name, _, value = word.partition("=")
        if word in WORLDS and not worlds:
            options.world = word
            worlds.append(word)
        elif word == "smoke":
            options.smoke = True
        elif name == "chunk" and value.isdigit() and int(value) > 0:
            options.chunk = int(value)
        else:
            raise ValueError(
                f"config argument {word!r} is none of {', '.join(WORLDS)} (one of them), smoke, "
                "chunk=N"
            )
    return options


def base(stage: str, options: ConfigDict) -> ConfigDict:
    """The fields of every stage, for the world of `options`."""
    config = ConfigDict()
    config.stage = stage
    config.seed = 0
    config.steps = 1000
    config.batch_size = 8
    config.accumulate = 1  # parts of a batch gone through one after another, to save memory
    config.log_every = 20
    config.save_every = 100
    config.sample_every = 0  # steps between sample videos; 0 is never
    config.keep = 2  # checkpoints kept

    config.data = data(options)
    config.model = model(options)
    config.pattern = ConfigDict()
    config.pattern.chunk = options.chunk  # frames generated at once
    config.pattern.first_chunk = config_dict.placeholder(int)  # where the first chunk differs
    if options.chunk > 1:
        config.pattern.first_chunk = 1  # clips start from one given frame
    config.pattern.window = 2 * options.chunk + 4  # frames that a frame attends to, at most
    config.pattern.sink = 0  # the first frames, which stay in the window
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "context": 1, "tensor": 1})

    config.shift = 8.0  # of the timestep
    config.guidance = 1.0  # 1 is none
    config.ema = ConfigDict({"decay": 0.99, "start": 0})
    config.init_from = ConfigDict()
    return config


def data(options: ConfigDict) -> ConfigDict:
    """The data of a world."""
    config = ConfigDict()
    config.name = "arena"
    config.directory = ""  # '' is TFDS's own, ~/tensorflow_datasets
    config.frames = 8  # of a training window
    config.height = config.width = 32
    config.num_actions = 5
    config.video_feature = "video"
    config.action_feature = "actions"
    config.workers = 0  # processes that read; 0 reads in this one
    config.episodes = 512
    config.episode_frames = 64
    if options.world == "atari":
        config.name = "atari:Boxing"
        config.height = config.width = 64
        config.num_actions = 18
        config.episodes = 256
        config.episode_frames = 64
    if options.chunk > 1:
        config.frames = 1 + 3 * options.chunk
    if options.smoke:
        config.episodes, config.episode_frames = 32, 32
    return config


def model(options: ConfigDict) -> ConfigDict:
    """The network of a world: the attributes of `cfpp.models.dit.DiT`."""
    config = ConfigDict()
    config.channels = 3
    config.height = config.width = 32
    config.patch = 8
    config.dim = 128
    config.ffn_dim = 512
    config.heads = 4
    config.layers = 4
    config.frequency_dim = 256
    config.num_actions = 5
    if options.world == "atari":
        config.height = config.width = 64
        config.patch = 16
        config.dim, config.ffn_dim, config.heads = 192, 768, 6
        config.num_actions = 18
    config.text_dim = 0
    config.rotary_base = 100.0
    config.gate_init = 1.0
    config.prediction = "x0"
    config.dtype = "float32"
    config.attention = "auto"  # see cfpp.attention.dispatch
    config.remat = "none"
    config.unroll = 4
    if options.smoke:
        config.dim, config.ffn_dim, config.layers, config.unroll = 64, 128, 2, 1
    return config


def muon(rate: float = 0.02, adam_rate: float = 2e-3) -> ConfigDict:
    """Muon on all matrices, Adam on the rest: by far the fastest start for small models."""
    config = optimizer("muon", rate)
    config.adam_rate = adam_rate
    return config


def optimizer(name: str, rate: float) -> ConfigDict:
    """An optimizer's fields; see `cfpp.stages.stage.optimizer`."""
    config = ConfigDict()
    config.name = name
    config.rate = rate  # the peak
    config.adam_rate = rate  # Muon's Adam part
    config.b1, config.b2 = 0.9, 0.999
    config.weight_decay = 0.0
    config.clip = 1.0  # global norm of the gradient
    config.schedule = "cosine"  # or 'constant'
    config.warmup = 10
    config.final_rate = 0.1  # where the cosine ends, as a share of the peak
    return config
