"""What the configs of all stages share: worlds (data and network sizes) and the fields of a run.

A config's argument is a comma-separated list: at most one world (`arena`, `atari`, `wan_1_3b`), and
options `chunk=N`, `smoke` and, in stage 3, `teacher=14b`. Stage files add their own fields.

`wan_1_3b` is Wan 2.1 1.3B at the published size: 21 latent frames of 60 x 104 x 16, 512 tokens of
text, and the published hyperparameters (docs/method.md tells where they differ).
"""

import ml_collections
from ml_collections import config_dict

ConfigDict = ml_collections.ConfigDict

WORLDS = ("arena", "atari", "wan_1_3b")

# Wan 2.1's transformers.
WAN_SIZES = {
    "1_3b": {"dim": 1536, "ffn_dim": 8960, "heads": 12, "layers": 30},
    "14b": {"dim": 5120, "ffn_dim": 13824, "heads": 40, "layers": 40},
}


def parse(arg: str, teachers: tuple[str, ...] = ()) -> ConfigDict:
    """Reads a config's argument.

    Args:
      arg: the argument.
      teachers: values of the option `teacher=SIZE`, for the stage that has it.

    Returns:
      world, chunk (frames generated at once), smoke (the job in miniature) and teacher.

    Raises:
      ValueError: a word that is none of these.
    """
    options = ConfigDict({"world": "arena", "chunk": 1, "smoke": False, "teacher": ""})
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
        elif name == "teacher" and value in teachers:
            options.teacher = value
        else:
            known = ["smoke", "chunk=N", *(f"teacher={size}" for size in teachers)]
            raise ValueError(
                f"config argument {word!r} is none of {', '.join(WORLDS)} (one of them), "
                + ", ".join(known)
            )
    if options.world.startswith("wan") and options.smoke:
        raise ValueError(f"config argument 'smoke' has no {options.world}; take arena or atari")
    if options.teacher and not options.world.startswith("wan"):
        raise ValueError(f"config argument 'teacher={options.teacher}' needs the world wan_1_3b")
    return options


def base(stage: str, options: ConfigDict) -> ConfigDict:
    """The fields that stages share, for the world of `options`; some delete a few."""
    config = ConfigDict()
    config.stage = stage
    config.seed = 0
    config.steps = 1000
    config.batch_size = 8
    config.accumulate = 1  # parts of a batch gone through one after another, to save memory
    config.log_every = 20
    config.save_every = 100
    config.sample_every = 200  # steps between sample videos, with one at the end; 0 is never
    config.keep = 2  # checkpoints kept

    config.data = data(options)
    config.model = model(options)
    # To set either is to set both.
    for field in ("height", "width", "channels", "num_actions", "text_dim"):
        config.model[field] = config.data.get_ref(field)
    config.pattern = ConfigDict()
    for field in ("chunk", "first_chunk", "window"):  # None: there is none
        config.pattern[field] = config_dict.placeholder(int)
    config.pattern.chunk = options.chunk  # frames generated at once
    if options.chunk > 1:
        config.pattern.first_chunk = 1  # clips start from one given frame
    # Frames that a frame attends to, at most: no more than in training, as they are told by place.
    config.pattern.window = min(2 * options.chunk + 4, config.data.frames)
    config.pattern.sink = 0  # the first frames, which stay in the window
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "context": 1, "tensor": 1})

    config.shift = 8.0  # of the timestep
    config.guidance = 1.0  # 1 is none
    config.ema = ConfigDict({"decay": 0.99, "start": 0})
    config.frozen_dtype = "float32"  # of networks that only lend their output
    config.init_from = ConfigDict()
    if options.world == "atari":
        config.batch_size = 4  # of 64 tokens a frame: more steps do more than larger ones
    if options.smoke:
        config.sample_every = 0
    if options.world == "wan_1_3b":
        config.batch_size = 64
        config.save_every = 250
        config.sample_every = 0  # latents are no pictures
        config.pattern.first_chunk = None  # clips start from noise
        config.pattern.window = config.data.frames
        config.mesh.update({"data": 1, "fsdp": -1})
        config.shift = 5.0
        config.frozen_dtype = "bfloat16"
    return config


def schedule(options: ConfigDict) -> ConfigDict:
    """The schedule that students run by: positions on the unshifted 1000-grid, and their shift."""
    config = ConfigDict()
    config.shift = 4.0
    config.positions = (1000.0, 500.0)
    config.first_positions = (1000.0, 750.0, 500.0, 250.0)  # of the first generated chunk
    if options.world == "arena":
        # At 0.36 the second step cleans what the first has chosen; at 0.8 it would choose anew
        # (docs/experiments.md).
        config.positions = (1000.0, 125.0)
        config.first_positions = (1000.0, 500.0, 250.0, 125.0)
    if options.world == "wan_1_3b":
        config.shift = 5.0
        if options.chunk > 1:  # published with four steps in every chunk
            config.positions = config.first_positions
    return config


def data(options: ConfigDict) -> ConfigDict:
    """The data of a world."""
    config = ConfigDict()
    config.name = "arena"
    config.directory = ""  # '' is TFDS's own, ~/tensorflow_datasets
    config.frames = 8  # of a training window
    config.height = config.width = 32
    config.channels = 3
    config.latents = False  # float latents of a video autoencoder, or else pixels
    config.num_actions = 5
    config.text_tokens = config.text_dim = 0  # of an episode's text; 0 is none
    config.video_feature = "video"
    config.action_feature = "actions"
    config.text_feature = "text"
    config.workers = 0  # processes that read; 0 reads in this one
    config.episodes = 2048
    config.episode_frames = 64
    if options.world == "atari":
        config.name = "atari:Boxing"
        config.height = config.width = 64
        config.num_actions = 18
        config.episodes = 256
    if options.world == "wan_1_3b":
        config.name = ""  # tfds:NAME of what you have prepared (docs/data.md)
        config.latents = True
        config.frames, config.height, config.width, config.channels = 21, 60, 104, 16
        config.num_actions, config.action_feature = 0, ""
        config.text_tokens, config.text_dim = 512, 4096
    elif options.chunk > 1:
        config.frames = 1 + 3 * options.chunk
    if options.smoke:
        config.episodes, config.episode_frames = 32, 32
    return config


def model(options: ConfigDict) -> ConfigDict:
    """The network of a world: the attributes of `cfpp.models.dit.DiT`, but for the data's own."""
    config = ConfigDict()
    config.patch = 8
    config.dim = 128
    config.ffn_dim = 512
    config.heads = 4
    config.layers = 4
    config.frequency_dim = 256
    if options.world == "atari":
        config.dim, config.ffn_dim, config.heads = 192, 768, 6
    config.rotary_base = 100.0
    config.gate_init = 1.0
    config.prediction = "x0"
    config.dtype = "float32"
    config.cache_dtype = ""  # of a rollout's keys and values: "int8", "float8_e4m3fn"; "": dtype
    config.attention = "auto"  # see cfpp.attention.dispatch
    config.remat = "none"
    config.unroll = 4
    if options.world == "wan_1_3b":
        config.update(WAN_SIZES["1_3b"])
        config.patch = 2
        config.rotary_base = 10000.0
        config.gate_init = 0.0
        config.prediction = "velocity"
        config.dtype = "bfloat16"
        config.remat = "full"
        config.unroll = 1
    if options.smoke:
        config.dim, config.ffn_dim, config.heads = 64, 128, 4
        config.layers, config.unroll = 2, 1
    return config


def muon(learning_rate: float = 0.02, adam_learning_rate: float = 2e-3) -> ConfigDict:
    """Muon on all matrices, Adam on the rest: by far the fastest start for small models."""
    config = optimizer("muon", learning_rate)
    config.adam_learning_rate = adam_learning_rate  # the peak of what is not Muon's
    return config


def wan_optimizer(learning_rate: float = 2e-6) -> ConfigDict:
    """AdamW as published for Wan 2.1 1.3B, at a constant rate."""
    config = optimizer("adamw", learning_rate)
    config.b1 = 0.0
    config.weight_decay, config.clip = 0.01, 10.0
    config.schedule, config.warmup = "constant", 0
    del config.final_fraction
    return config


def optimizer(name: str, learning_rate: float) -> ConfigDict:
    """An optimizer's fields; see `cfpp.stages.stage.optimizer`."""
    config = ConfigDict()
    config.name = name
    config.learning_rate = learning_rate  # the peak
    config.b1, config.b2 = 0.9, 0.999
    config.mu_dtype = "float32"  # of the first moment
    config.weight_decay = 0.0
    config.clip = 1.0  # global norm of the gradient
    config.schedule = "cosine"  # or 'constant'
    config.warmup = 10
    config.final_fraction = 0.1  # where the cosine ends, as a share of the peak
    return config
