"""Streams video from a finished stage or an exported model.

python -m cfpp.rollout --workdir=runs/quickstart --frames=200 --steps=2 --out=play.mp4
"""

import argparse
import contextlib
import itertools
import re
import signal
import time
from collections.abc import Callable, Iterator

import jax
import ml_collections
import numpy as np
from absl import logging
from tqdm import tqdm

from cfpp import media, paths
from cfpp.attention.cache import LARGEST_VALUES
from cfpp.attention.dispatch import IMPLEMENTATIONS
from cfpp.data import pipeline, sources
from cfpp.data.actions import held_actions
from cfpp.errors import ArgumentParser, UserError, exit_on_user_error
from cfpp.models.network import Network, Params
from cfpp.parallel import mesh
from cfpp.rollout import generate
from cfpp.rollout.sampler import TEACHER_STEPS
from cfpp.rollout.stream import Player
from cfpp.train import checks, stored, workdirs

FRAMES_PER_SECOND = 8  # of the video file
LONGEST_HOLD = 6  # frames that a random action is held
LONGEST_ACTIONS = 10**6  # frames that a given action is held, at most
LIMITS = {"frames": 10**9, "steps": 1000, "first_steps": 1000, "window": 10**4, "scale": 64}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = ArgumentParser("cfpp.rollout", __doc__)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--workdir", help="working directory of a stage or of the quickstart")
    model.add_argument("--checkpoint", help="what python -m cfpp.export wrote")
    parser.add_argument("--frames", type=int, default=96, help="how many to generate")
    parser.add_argument(
        "--steps", type=int, help=f"network steps a frame; a teacher's default: {TEACHER_STEPS}"
    )
    parser.add_argument(
        "--first_steps", type=int, help="of the first chunk; default: as trained, or as --steps"
    )
    steering = parser.add_mutually_exclusive_group()
    steering.add_argument(
        "--actions", help="action numbers such as 4,4,4,2 or 4x12,2x6; repeated to the end"
    )
    steering.add_argument(
        "--random_actions", action="store_true", help="held random actions (the default)"
    )
    parser.add_argument(
        "--first_frame",
        help="a picture to start from, or a latent [H, W, C] in an .npy; default: a held-out frame",
    )
    parser.add_argument(
        "--text", help="an .npy of a text's embeddings [tokens, size]; default: a held-out clip's"
    )
    parser.add_argument("--guidance", type=float, help="a teacher's weight; default: as trained")
    parser.add_argument("--window", type=int, help="frames to remember; default: as trained")
    parser.add_argument("--sink", type=int, help="first frames to keep; default: as trained")
    parser.add_argument("--mesh", help="several devices for the stream: context=4,tensor=2")
    parser.add_argument("--latency", action="store_true", help="write the cache in a separate pass")
    parser.add_argument(
        "--cache_dtype", choices=sorted(LARGEST_VALUES), help="hold keys and values in 8 bits"
    )
    kernels = [name for name, kernel in IMPLEMENTATIONS.items() if kernel.cached]
    parser.add_argument(
        "--attention", choices=("auto", *kernels), help="kernels; default: the model's own"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=int, default=8, help="enlargement of the video")
    parser.add_argument(
        "--out",
        help="the file to write, an .mp4, or an .npy of latents; default: rollout.mp4 or .npy",
    )
    return parser.parse_args(arguments)


def parse_actions(text: str, num_actions: int) -> list[int]:
    """Reads `4,4,2` or `4x12,2x6`.

    Raises:
      UserError: a word that is no action of the model.
    """
    actions = []
    for word in text.split(","):
        action, _, times = word.strip().partition("x")
        if not re.fullmatch(r"[0-9]{1,9}(x[0-9]{1,9})?", word.strip()):
            raise UserError(f"--actions: {word!r} is neither a NUMBER from 0 on nor NUMBERxTIMES")
        if int(action) >= num_actions:
            raise UserError(
                f"--actions: {action} is out of range; the model knows 0 to {num_actions - 1}"
            )
        actions += [int(action)] * min(int(times or 1), LONGEST_ACTIONS)
    if not actions:
        raise UserError("--actions names no action")
    return actions


def steering(options: argparse.Namespace, num_actions: int) -> Iterator[int]:
    """The endless sequence of actions that the command line asks for."""
    if options.actions is not None and not num_actions:
        raise UserError("--actions: the model takes none")
    if options.actions is not None:
        return itertools.cycle(parse_actions(options.actions, num_actions))
    return held_actions(np.random.default_rng(options.seed), max(num_actions, 1), LONGEST_HOLD)


def first_frames(
    options: argparse.Namespace, config: ml_collections.ConfigDict
) -> tuple[np.ndarray, np.ndarray]:
    """What to start from: the picture given, else a held-out frame of the run's data, else nothing.

    Returns:
      uint8 `[1, K, H, W, 3]` or, of latents, float32 `[1, K, H, W, C]`, K = 1 or 0; and the actions
      that led there, int32 `[1, K]`, 0 for a picture.

    Raises:
      UserError: the picture cannot be used, or the data are damaged.
    """
    height, width, channels = (config.model[name] for name in ("height", "width", "channels"))
    latents = has_latents(config)
    if options.first_frame and latents:
        frame = media.read_floats(options.first_frame, height, width, channels)
    elif options.first_frame:
        frame = media.read_image(options.first_frame, height, width)
    if options.first_frame:
        return frame[None, None], np.zeros((1, 1), np.int32)
    dtype = np.float32 if latents else np.uint8
    clip, why = held_out(options, config)
    if clip:
        return clip["video"].astype(dtype), clip["actions"]
    kind = "FILE.npy" if latents else "PICTURE"
    trained = ", as the model was trained to" if config.get("given") else ""
    print(f"starting from noise: {why}; --first_frame={kind} starts from a frame{trained}")
    return np.zeros((1, 0, height, width, channels), dtype), np.zeros((1, 0), np.int32)


def text_of(
    options: argparse.Namespace, config: ml_collections.ConfigDict, text_dim: int
) -> generate.Condition:
    """The text given, else that of the held-out clip: float32 `[1, length, text_dim]` as `text`.

    One given is filled up with zeros to the length that the model was trained with. Nothing where
    the model takes none.

    Raises:
      UserError: there is no text, it is of another size or too long, or the model takes none.
    """
    if not text_dim:
        if options.text:
            raise UserError("--text: the model takes none")
        return {}
    if options.text:
        text = media.read_floats(options.text, None, text_dim)
        length = config.data.get("text_tokens", 0) or len(text)
        if len(text) > length:
            raise UserError(
                f"--text={options.text}: {len(text)} tokens; the model was trained with {length}"
            )
        return {"text": np.pad(text, ((0, length - len(text)), (0, 0)))[None]}
    clip, why = held_out(options, config)
    if clip is None:
        raise UserError(
            f"--text is missing, and {why}; give an .npy of embeddings, floats [tokens, {text_dim}]"
        )
    return {"text": clip["text"].astype(np.float32)}


def held_out(
    options: argparse.Namespace, config: ml_collections.ConfigDict
) -> tuple[dict[str, np.ndarray] | None, str]:
    """A held-out clip of one frame, of the run's data, or why none is taken."""
    if not options.workdir:
        return None, "an export comes without data"
    if options.text:
        return None, "--text comes without a frame"
    workdirs.require(config, options.workdir, sources.FIELDS)
    try:
        return pipeline.test_clips(config.data, 1, 1), ""
    except sources.MissingError as error:
        return None, str(error)


def has_latents(config: ml_collections.ConfigDict) -> bool:
    """Whether a stage's model is of a video autoencoder's latents, and not of pixels."""
    return config.data.get("latents", False) or config.model.channels != 3


def destination(options: argparse.Namespace, config: ml_collections.ConfigDict) -> str:
    """The file to write.

    Raises:
      UserError: its name is not that of what it will hold, or it cannot be written.
    """
    latents = has_latents(config)
    kind, suffix = ("latents are an NPY", ".npy") if latents else ("the video is an MP4", ".mp4")
    out = options.out or f"rollout{suffix}"
    if not out.lower().endswith(suffix):
        raise UserError(f"--out={out}: {kind}; give a name that ends in {suffix}")
    paths.check_file(out)
    return out


def writer_of(path: str, scale: int) -> media.Mp4Writer | media.NpyWriter:
    """The writer of frames to a file, by its name."""
    if path.lower().endswith(".npy"):
        return media.NpyWriter(path)
    return media.Mp4Writer(path, FRAMES_PER_SECOND, scale)


def load(
    options: argparse.Namespace, model: stored.Stored, network: Network
) -> tuple[generate.Rollout, Params]:
    """The rollout of a model's network that is asked for, and the parameters.

    These are laid out over the devices of the ambient mesh if there is one.

    Raises:
      UserError: the model cannot run so, or it does not divide over the mesh.
    """
    path, config = model.folder, model.config
    network = as_asked(options, network)
    dit = network.dit
    rollout = generate.for_stage(
        network,
        config,
        options.steps,
        options.first_steps,
        guidance=options.guidance,
        fused=not options.latency,
    )
    if options.guidance not in (None, 1.0):
        if not (dit.num_actions or dit.text_dim):
            raise UserError(
                f"--guidance: the model of {path} takes no actions or text to be guided by"
            )
        if checks.is_untaught(config, lambda parent: stored.find(parent).config):
            raise UserError(
                f"--guidance: {path} was trained with config.drop_rate=0 and knows no "
                "unconditional prediction"
            )
    sharding = None
    if options.mesh:
        device_mesh = jax.sharding.get_mesh()
        mesh.check(device_mesh, config.model)
        sharding = mesh.state_shardings(network.shapes(), device_mesh)
    return rollout, network.for_inference(model.load(sharding))


def as_asked(options: argparse.Namespace, network: Network) -> Network:
    """The network with the pattern, the cache and the kernels that the command line asks for.

    Raises:
      UserError: the pattern's sizes do not fit one another, or leave no frame to look back on.
    """
    given = lambda *names: {
        name: value for name in names if (value := getattr(options, name)) is not None
    }
    trained = network.pattern.window
    try:
        network = network.attending(**given("window", "sink"))
    except ValueError as error:
        raise UserError(f"--window, --sink: {error}") from error
    checks.check_history(network.pattern)
    if trained and network.pattern.window > trained:
        logging.warning(
            "--window is %d; the model was trained with %d and has never looked back further",
            network.pattern.window,
            trained,
        )
    return network.clone(**given("cache_dtype", "attention"))


@contextlib.contextmanager
def interruption() -> Iterator[Callable[[], bool]]:
    """While open, Ctrl-C is only noted, as the yielded function tells; a second one ends all."""
    received = []

    def note(*_):
        received.append(True)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGINT, before)


def run(options: argparse.Namespace) -> None:
    """Streams the video that the command line asks for.

    Raises:
      UserError: the mesh, the model, the picture, the actions or the output file cannot be used.
    """
    for name, most in LIMITS.items():
        value = getattr(options, name)
        if value is not None and not 1 <= value <= most:
            wanted = "at least 1" if value < 1 else f"at most {most}"
            raise UserError(f"--{name} is {value}; it must be {wanted}")
    least, most = checks.RANGES["guidance"]
    if options.guidance is not None and not least <= options.guidance <= most:
        raise UserError(f"--guidance is {options.guidance:g}; it must be {least:g} to {most:g}")
    if not 0 <= options.seed < 2**32:
        raise UserError(f"--seed is {options.seed}; it must be at least 0 and less than 2**32")
    with contextlib.ExitStack() as stack:
        if options.mesh:
            stack.enter_context(jax.set_mesh(mesh.create(mesh.sizes(options.mesh))))
        stream(options)


def stream(options: argparse.Namespace) -> None:
    """Streams on the devices of the ambient mesh, or on one; see `run`."""
    model = stored.find(options.workdir or options.checkpoint)
    network = model.network()
    out = destination(options, model.config)
    actions = steering(options, network.dit.num_actions)
    text = text_of(options, model.config, network.dit.text_dim)
    context, given = first_frames(options, model.config)
    condition = {"actions": given} | text
    rollout, params = load(options, model, network)
    key = jax.random.key(options.seed)
    player = lambda: Player(rollout, params, context, condition, key)
    chunk = rollout.network.pattern.chunk

    def play(player):
        taken = list(itertools.islice(actions, player.chunk))
        return player.play(np.array([taken], np.int32))[0]

    session = player()
    for _ in range(2):  # compiles; on several devices a second time for the layout it leaves
        session.play(np.zeros((1, session.chunk), np.int32))
    session.wait()
    del session  # and its cache, before there is another
    latency, done = None, 0
    seconds, timed = 0.0, 0  # of the frames after the first chunk
    with (
        writer_of(out, options.scale) as writer,
        tqdm(total=options.frames, unit="frame") as progress,
        interruption() as interrupted,
    ):
        begin = time.perf_counter()
        session = player()
        while done < options.frames and not (done and interrupted()):
            frames = play(session)
            arrived = time.perf_counter()
            session.wait()
            if latency is None:
                latency = arrived - begin
            else:
                seconds += time.perf_counter() - begin
                timed += chunk
            for frame in frames[: options.frames - done]:
                writer.append(frame)
                done += 1
                progress.update()
            begin = time.perf_counter()

    ended = "" if done == options.frames else f", interrupted: {options.frames} were asked for"
    print(f"{out}: {done} frames by the {model.config.stage} model{ended}")
    print(f"first frame after: {1000 * latency:.1f} ms, the cache filled and all compiled")
    if timed:
        print(f"then: {timed / seconds:.1f} frames/s, the writing of the file not counted")
    print(f"network passes a frame: {rollout.passes / chunk:g}")


if __name__ == "__main__":
    with exit_on_user_error():
        run(parse())
