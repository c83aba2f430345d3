"""`python -m cfpp.rollout` on a tiny working directory: what it writes, what it refuses."""

import dataclasses
import importlib
import json
import os
import pathlib
import pickle
import re
import shutil
import signal
import subprocess
import sys
from unittest import mock

import imageio.v3 as imageio
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from cfpp import export, media
from cfpp.attention.pattern import Pattern
from cfpp.data import pipeline
from cfpp.errors import UserError
from cfpp.models import dit
from cfpp.rollout import __main__ as command
from cfpp.rollout import generate
from cfpp.rollout import stream as stream_module
from cfpp.rollout.sampler import consistency
from cfpp.rollout.stream import Player
from cfpp.train import jobs, stored
from configs import common
from tests import tiny


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A stage-1 run of one step on the arena."""
    folder = tmp_path_factory.mktemp("run")
    config = importlib.import_module("configs.stage1").get_config("smoke")
    config.steps = 1
    config.batch_size = 2
    config.optimizer = common.optimizer("adamw", 1e-3)  # compiles faster
    config.model.update({"dim": 24, "ffn_dim": 32, "heads": 2, "unroll": 1})
    config.data.update({"directory": str(folder / "data"), "episodes": 2, "episode_frames": 16})
    assert jobs.run(config.lock(), folder / "stage1")
    return folder / "stage1"


def stream(workdir, *arguments):
    out = workdir / "out.mp4"
    options = command.parse([f"--workdir={workdir}", f"--out={out}", "--scale=1", *arguments])
    command.run(options)
    return imageio.imread(out)


def test_any_number_of_frames(workdir, capsys):
    video = stream(workdir, "--frames=11", "--steps=2")
    assert video.shape == (11, 32, 32, 3)
    said = capsys.readouterr().out
    assert "first frame after:" in said and "frames/s" in said
    assert "network passes a frame: 2" in said


def test_the_readmes_program_streams(workdir):
    page = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {}
    exec(program.replace("runs/quickstart", str(workdir)), names)
    assert names["frame"].shape == (32, 32, 3)


def test_the_serving_pages_programs_stream(workdir, tmp_path):
    page = (pathlib.Path(__file__).parents[1] / "docs/serving.md").read_text()
    server, smaller = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    stored.export(workdir, tmp_path / "export")
    names = {}
    exec(server.replace('"export"', repr(str(tmp_path / "export"))), names)
    picture = np.full((32, 32, 3), 9, np.uint8)
    session, programs = names["open_session"](picture, 1), stream_module._generate._cache_size()
    assert names["next_frames"](session, 4).shape == (1, 32, 32, 3)
    assert stream_module._generate._cache_size() == programs  # warm
    state = session.state()
    frame = names["next_frames"](session, 2)
    other = names["open_session"](picture, 2)
    other.restore(state)
    np.testing.assert_array_equal(names["next_frames"](other, 2), frame)
    exec(smaller, names)
    smaller_frame = names["next_frames"](names["open_session"](picture, 1), 4)
    assert smaller_frame.shape == (1, 32, 32, 3)
    assert names["network"].dit.cache_dtype == "int8" and names["network"].pattern.window == 4


def test_the_workdir_may_be_relative(workdir, monkeypatch):
    monkeypatch.chdir(workdir.parent)
    options = ["--workdir=stage1", "--out=relative.mp4", "--frames=2", "--steps=1", "--scale=1"]
    command.run(command.parse(options))
    assert len(imageio.imread(workdir.parent / "relative.mp4")) == 2


def test_every_frame_gets_its_action(workdir, tmp_path, monkeypatch):
    """From noise, with a first chunk of three frames and two in all later ones."""
    folder = shutil.copytree(workdir, tmp_path / "chunks")
    config = json.loads((folder / "config.json").read_text())
    config["pattern"] |= {"chunk": 2, "first_chunk": 3, "window": 6}
    config["data"]["directory"] = str(tmp_path / "nowhere")  # so it starts from noise
    (folder / "config.json").write_text(json.dumps(config))
    given = []

    class Recorded(Player):
        def play(self, actions):
            given.append(actions[0].tolist())
            return super().play(actions)

    monkeypatch.setattr(command, "Player", Recorded)
    assert len(stream(folder, "--frames=7", "--steps=1", "--actions=0,1,2,3,4")) == 7
    assert given[-3:] == [[0, 1, 2], [3, 4], [0, 1]]


def test_latency_mode_counts_its_pass(workdir, capsys):
    stream(workdir, "--frames=2", "--steps=2", "--latency")
    assert "network passes a frame: 3" in capsys.readouterr().out


def test_ctrl_c_keeps_what_was_streamed(workdir, capsys):
    play, played = Player.play, []

    def interrupted(player, actions):
        played.append(actions)
        if len(played) == 2 + 3:  # two to compile
            os.kill(os.getpid(), signal.SIGINT)
        return play(player, actions)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with mock.patch.object(Player, "play", interrupted):
            video = stream(workdir, "--frames=11", "--steps=1")
    finally:
        assert signal.signal(signal.SIGINT, handler) is signal.default_int_handler
    assert len(video) == 3
    said = capsys.readouterr().out
    assert "3 frames by the ar_diffusion model, interrupted: 11 were asked for" in said
    assert "first frame after:" in said


ON_8_DEVICES = """
import sys
from concurrent.futures import ThreadPoolExecutor
from unittest import mock
import jax
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)
import numpy as np
from cfpp import media
from cfpp.rollout import __main__ as command, stream

def frames(*arguments):
    with mock.patch.object(media.Mp4Writer, "append") as append:
        command.run(command.parse([*sys.argv[1:], "--frames=4", "--steps=2", *arguments]))
    return np.stack([call.args[0] for call in append.call_args_list]).astype(int)

class Noted(stream.Player):
    def __init__(self, rollout, params, *rest):
        axes.update(axis for x in jax.tree.leaves(params) for axis in x.sharding.spec)
        pool.submit(super().__init__, rollout, params, *rest).result()

    def play(self, actions):  # in another thread than the one that has set the mesh
        return pool.submit(super().play, actions).result()

alone = frames()
programs = stream._generate._cache_size()
command.Player, pool, axes = Noted, ThreadPoolExecutor(1), set()
divided = frames("--mesh=data=1,context=4,tensor=2")
assert stream._generate._cache_size() <= programs + 2  # the first chunk's and the others'
np.testing.assert_allclose(divided, alone, atol=1)
assert axes == {None, "tensor"}, axes  # of context nothing is left to gather in each pass
print("equal")
"""


def test_one_stream_over_8_devices(workdir):
    paths = [f"--workdir={workdir}", f"--out={workdir / 'out.mp4'}"]
    command = [sys.executable, "-c", ON_8_DEVICES, *paths]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.endswith("equal\n"), done.stderr[-2000:]


def test_a_mesh_of_one_device(workdir):
    out = workdir / "one.mp4"
    options = [f"--workdir={workdir}", "--frames=2", "--steps=2", "--mesh=context=1"]
    command.run(command.parse([*options, f"--out={out}"]))
    assert out.exists()


def test_export_is_enough(workdir, tmp_path):
    stored.export(workdir, tmp_path / "export")
    picture = tmp_path / "first.png"
    media.write_image(picture, np.full((32, 32, 3), 20, np.uint8))
    arguments = ["--frames=2", "--steps=1", f"--first_frame={picture}"]
    out = [f"--out={tmp_path / 'x.mp4'}", "--scale=1"]
    command.run(command.parse([f"--checkpoint={tmp_path / 'export'}", *arguments, *out]))
    first = imageio.imread(tmp_path / "x.mp4")
    np.testing.assert_array_equal(first, stream(workdir, *arguments))


def test_an_export_that_would_not_stream_is_not_written(workdir, tmp_path):
    folder = shutil.copytree(workdir, tmp_path / "older")
    config = json.loads((folder / "config.json").read_text())
    del config["data"]["channels"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"of another version: it has no field data\.channels;"):
        stored.export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_in_bfloat16_is_what_passes_in_bfloat16_use(workdir, tmp_path):
    export.main([f"--workdir={workdir}", f"--out={tmp_path / 'half'}", "--dtype=bfloat16"])
    half, whole = stored.find(tmp_path / "half"), stored.find(workdir).load()
    params = half.load()
    assert params["blocks"]["mlp_in"]["kernel"].dtype == jnp.bfloat16
    used = half.network().clone(dtype="bfloat16").for_inference(whole)
    jax.tree.map(np.testing.assert_array_equal, params, used)
    out = [f"--out={tmp_path / 'x.mp4'}", "--scale=1", "--frames=2", "--steps=1"]
    command.run(command.parse([f"--checkpoint={tmp_path / 'half'}", *out]))
    assert len(imageio.imread(tmp_path / "x.mp4")) == 2


def test_starts_from_a_held_out_frame_or_from_noise(workdir, capsys):
    config = stored.find(workdir).config
    held_out = pipeline.test_clips(config.data, 1, 1)
    options = command.parse([f"--workdir={workdir}"])
    video, actions = command.first_frames(options, config)
    np.testing.assert_array_equal(video, held_out["video"])
    np.testing.assert_array_equal(actions, held_out["actions"])  # the one that led there
    assert capsys.readouterr().out == ""
    options = command.parse(["--checkpoint=export"])
    assert [x.shape for x in command.first_frames(options, config)] == [(1, 0, 32, 32, 3), (1, 0)]
    said = "starting from noise: an export comes without data; --first_frame=PICTURE starts"
    assert capsys.readouterr().out == f"{said} from a frame\n"
    with config.unlocked():
        config.data.name = ""  # as of Wan
    options = command.parse([f"--workdir={workdir}"])
    assert command.first_frames(options, config)[0].shape[1] == 0
    assert "starting from noise: no data source ''" in capsys.readouterr().out
    options = command.parse(["--checkpoint=export"])
    with config.unlocked():
        config.given = 1
    command.first_frames(options, config)
    assert capsys.readouterr().out == f"{said} from a frame, as the model was trained to\n"


def test_starts_from_a_picture(workdir, tmp_path):
    picture = tmp_path / "first.png"
    media.write_image(picture, np.zeros((32, 32, 3), np.uint8))
    assert len(stream(workdir, "--frames=2", "--steps=1", f"--first_frame={picture}")) == 2
    media.write_image(picture, np.zeros((16, 32, 3), np.uint8))
    with pytest.raises(UserError, match="32 wide and 16 high"):
        stream(workdir, f"--first_frame={picture}")
    picture.write_text("no picture")
    with pytest.raises(UserError, match="not a picture"):
        stream(workdir, f"--first_frame={picture}")


@pytest.mark.parametrize(
    ("pattern", "given"),
    [(Pattern(chunk=3, window=7, sink=1), 1), (Pattern(first_chunk=3, window=5, sink=1), 0)],
)
def test_stream_is_the_clip(pattern, given):
    """The player's frames are those of the one-scan rollout, however long it has run.

    Their latents agree within 1e-5 of the largest, some 6, in each of up to ten passes that build
    on one another: d = 6e-4. A byte is then off by one at most, and only where 127.5 x is as near
    as 127.5 d to the boundary of two bytes, which are 1 apart: in a share of 255 d.
    """
    net = tiny.network(pattern, channels=3)
    params, key = tiny.params(net), jax.random.key(3)
    rollout = generate.Rollout(net, consistency(2, 3.0, first_steps=3))
    rng, end = np.random.default_rng(0), given + 12
    context = rng.integers(0, 256, (2, given, 8, 12, 3), dtype=np.uint8)
    actions = tiny.actions(end)
    clip = rollout.clip(params, context, {"actions": actions}, key, 12)
    player = Player(rollout, params, context, {"actions": actions[:, :given]}, key)
    frames, i = [], given
    while i < end:
        now = actions[:, i : i + player.chunk]
        i += player.chunk
        frames.append(player.play(now))
    off = np.abs(np.concatenate(frames, 1).astype(int) - clip)
    assert off.max() <= 1 and np.mean(off) < 255 * 6e-4
    assert np.mean((clip > 0) & (clip < 255)) > 0.2  # else there would be little to see


def test_positions_turn_alike_at_any_length_of_a_stream():
    frequency = 100.0 ** (-np.arange(0, 12, 2) / 12)
    frames = np.array([0, 3, 1023, 1024, 10**6 + 7, 2**24 + 1, 10**9 - 1])
    angles = dit.phase(jnp.asarray(frames), frequency)
    off = np.asarray(angles, np.float64) - frames[:, None] * frequency
    assert np.abs(off - 2 * np.pi * np.round(off / (2 * np.pi))).max() < 0.002
    short = np.arange(1024)  # in training, to the bit
    expected = short.astype(np.float32)[:, None] * frequency.astype(np.float32)
    np.testing.assert_array_equal(dit.phase(jnp.asarray(short), frequency), expected)


def test_frames_do_not_wait_for_their_context_pass():
    """Kept apart, it is a program of its own: the one that makes the frames leaves the cache be."""
    net = tiny.network(Pattern(first_chunk=2, window=3), channels=3)
    rollout = generate.Rollout(net, consistency(1, 3.0), fused=False)
    caches = []

    def noted(rollout, params, cache, stream):
        assert (stream.pending_frame >= 0).all()
        caches.append(np.array(cache.frame))
        return context_pass(rollout, params, cache, stream)

    context_pass = stream_module._context_pass
    context, condition = np.zeros((1, 0, 8, 12, 3), np.uint8), {"actions": tiny.actions(0)[:1]}
    with mock.patch.object(stream_module, "_context_pass", noted):
        player = Player(rollout, tiny.params(net), context, condition, jax.random.key(0))
        chunks = [player.play(np.zeros((1, size), np.int32)).shape[1] for size in (2, 1, 1)]
    assert len(caches) == 3
    for n, frame in enumerate(caches):
        assert sorted(frame[frame >= 0]) == list(range(sum(chunks[:n])))[-3:]


def test_a_model_without_actions_needs_none():
    net = tiny.network(Pattern(chunk=2, window=4), channels=2, num_actions=0)
    params, given, key = tiny.params(net), np.asarray(tiny.latents(net, 1)), jax.random.key(0)
    rollout = generate.Rollout(net, consistency(2, 1.0))
    clip = rollout.clip(params, given, {}, key, 3)  # two chunks, of which a frame is left out
    assert clip.shape == (2, 3, *given.shape[2:])
    tiny.close(clip, rollout.clip(params, given, {"actions": tiny.actions(4)}, key, 3))


def test_latents_leave_as_they_are():
    """A stream that starts from latents gives latents, none of them clipped to pixels."""
    net = tiny.network(Pattern(window=4), channels=2)
    params, actions, key = tiny.params(net), tiny.actions(4), jax.random.key(0)
    rollout = generate.Rollout(net, consistency(2, 1.0))
    given = np.asarray(tiny.latents(net, 1))
    player = Player(rollout, params, given, {"actions": actions[:, :1]}, key)
    streamed = np.concatenate([player.play(actions[:, i : i + 1]) for i in range(1, 4)], 1)
    stream = rollout.start(params, given, {"actions": actions[:, :1]})
    noise = generate.gaussian_noise(key, given[:, 0].shape)
    sigmas, last = rollout.sampler.of_chunks(3)
    _, out = rollout.unroll(params, stream, {"actions": actions[:, 1:]}, noise, sigmas, last)
    assert streamed.dtype == np.float32 and np.abs(streamed).max() > 1
    tiny.close(streamed, out.x0)
    tiny.close(rollout.clip(params, given, {"actions": actions}, key, 3), out.x0)


def test_actions_that_a_stream_cannot_take():
    """One that the model does not know would make all later frames NaN."""
    net = tiny.network(Pattern(chunk=2, window=4), channels=3)
    context, condition = np.zeros((2, 0, 8, 12, 3), np.uint8), {"actions": np.zeros((2, 0), int)}
    rollout = generate.Rollout(net, consistency(1, 1.0))
    player = Player(rollout, tiny.params(net), context, condition, jax.random.key(0))
    first = np.zeros((2, 2, 8, 12, 3), np.uint8)
    for actions, message in {
        ((0, 1), (5, 2)): "actions are 0 to 2, got 0 to 5",
        ((0, -1), (1, 2)): "got -1 to 2",
        ((0,), (1,)): r"actions are \[2, 1\], not \[2, 2\]",
        ((0, 1),): r"actions are \[1, 2\], not \[2, 2\]",
        ((0, 1.5), (1, 2)): "actions are integers, got float64",
        None: r"actions are missing, not \[2, 2\]",
    }.items():
        given = {} if actions is None else {"actions": np.array(actions)}
        with pytest.raises(ValueError, match=message):
            player.play(*given.values())
        with pytest.raises(ValueError, match=message):  # of the given frames, which stay longer
            Player(rollout, tiny.params(net), first, given, jax.random.key(0))
    assert player.play(np.array([[0, 1], [1, 2]])).shape == (2, 2, 8, 12, 3)
    with pytest.raises(ValueError, match="a video is uint8, or float latents; got int32"):
        Player(rollout, tiny.params(net), context.astype(np.int32), condition, jax.random.key(0))


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"context": np.zeros((8, 12, 3), np.uint8)}, r"\[8, 12, 3\], not \[B, K, 8, 12, 3\]"),
        ({"context": np.zeros((1, 1, 8, 8, 3), np.uint8)}, r"\[1, 1, 8, 8, 3\], not \[B, K, 8, 12"),
        ({"context": np.zeros((0, 1, 8, 12, 3), np.uint8)}, r"\[0, 1, 8, 12, 3\], not \[B, K"),
        ({"condition": {}}, r"actions are missing, not \[1, 1\]"),
        ({"condition": {"action": np.zeros((1, 1), int)}}, "takes no 'action', but actions"),
        ({"condition": {"text": np.zeros((1, 1, 4))}}, "takes no 'text', but actions"),
        ({"rng": 0}, r"rng must be one key, such as jax\.random\.key\(0\), got 0"),
        ({"rng": jax.random.split(jax.random.key(0))}, "rng must be one key"),
        ({"rng": jax.random.PRNGKey(0)}, "rng must be one key"),  # it would compile all anew
    ],
)
def test_what_a_stream_cannot_start_from(start, message):
    net = tiny.network(Pattern(window=3), channels=3)
    context, condition = np.zeros((1, 1, 8, 12, 3), np.uint8), {"actions": np.zeros((1, 1), int)}
    usual = {"context": context, "condition": condition, "rng": jax.random.key(0)}
    with pytest.raises(ValueError, match=message):
        Player(generate.Rollout(net, consistency(1, 1.0)), tiny.params(net), **(usual | start))


@pytest.mark.parametrize(("fused", "cache_dtype"), [(True, ""), (False, "float8_e4m3fn")])
def test_a_session_goes_on_elsewhere(fused, cache_dtype):
    """From bytes, to the bit, with nothing compiled anew."""
    net = tiny.network(Pattern(chunk=2, window=4), channels=3).clone(cache_dtype=cache_dtype)
    rollout = generate.Rollout(net, consistency(2, 3.0), fused=fused)
    params = jax.tree.map(jnp.asarray, tiny.params(net))
    context, condition = np.zeros((2, 0, 8, 12, 3), np.uint8), {"actions": tiny.actions(0)}
    start = lambda seed: Player(rollout, params, context, condition, jax.random.key(seed))
    play = lambda player: player.play(np.ones((2, player.chunk), int))

    player, other = start(0), start(1)
    kept = [pickle.dumps(player.state())]
    frames = [play(player)]
    kept.append(pickle.dumps(player.state()))
    frames += [play(player), play(player)]
    programs = stream_module._generate._cache_size(), stream_module._context_pass._cache_size()
    for begin in (1, 0):
        other.restore(pickle.loads(kept[begin]))
        for expected in frames[begin:]:
            np.testing.assert_array_equal(play(other), expected)
    after = stream_module._generate._cache_size(), stream_module._context_pass._cache_size()
    assert after == programs
    further = np.zeros((2, 1, 8, 12, 3), np.uint8)  # given frames move where chunks begin
    other = Player(rollout, params, further, {"actions": tiny.actions(1)}, jax.random.key(2))
    other.restore(pickle.loads(kept[0]))
    np.testing.assert_array_equal(play(other), frames[0])
    np.testing.assert_array_equal(play(other), frames[1])
    single = Player(rollout, params, context[:1], {"actions": tiny.actions(0)[:1]}, player._rng)
    with pytest.raises(ValueError, match="the state is of another model, batch"):
        single.restore(player.state())


def test_a_prompt_counts_from_the_next_chunk_on():
    """Told before the first chunk, it is as if the stream had started with it."""
    net = tiny.network(Pattern(window=3), channels=2, num_actions=0, text_dim=4)
    params, given, key = tiny.params(net), np.zeros((1, 0, 8, 12, 2), np.float32), jax.random.key(0)
    one, other, null = (jax.random.normal(jax.random.key(i), (1, 3, 4)) for i in range(3))
    rollout = generate.Rollout(net, consistency(1, 1.0), guidance=2.0)
    players = {
        name: Player(rollout, params, given, {"text": text}, key, {"text": null})
        for name, text in {"one": one, "other": other, "changed": one}.items()
    }
    players["changed"].prompt(other)
    programs = stream_module._generate._cache_size()
    frames = {name: player.play() for name, player in players.items()}
    np.testing.assert_array_equal(frames["changed"], frames["other"])
    assert np.abs(frames["one"] - frames["other"]).max() > 1e-3
    with pytest.raises(ValueError, match=r"a text is \[2, 3, 4\], not \[1, length, 4\]"):
        players["one"].prompt(jnp.zeros((2, 3, 4)))
    for condition, found in {(): "missing", (5,): r"\[1, 3, 5\]"}.items():
        texts = {"text": np.zeros((1, 3, *condition))} if condition else {}
        with pytest.raises(ValueError, match=rf"a text is {found}, not \[1, length, 4\]"):
            Player(rollout, params, given, texts, key)
        with pytest.raises(ValueError, match=r"a text is"):
            Player(rollout, params, given, {"text": one}, key, texts or {"text": None})
    with pytest.raises(ValueError, match=r"a text is \[1, 0, 4\]"):
        players["one"].prompt(np.zeros((1, 0, 4)))
    with pytest.raises(ValueError, match=r"a text is \[1, 5, 4\], but null's \[1, 3, 4\]"):
        players["one"].prompt(np.zeros((1, 5, 4)))
    for guidance, wrong in ((None, {"text": null}), (2.0, {"actions": null}), (2.0, {})):
        other_rollout = rollout.replace(guidance=guidance)
        with pytest.raises(ValueError, match="for a rollout with guidance, got "):
            Player(other_rollout, params, given, {"text": one}, key, wrong)
    players["one"].prompt(np.asarray(other).tolist())  # any numbers of that shape
    stronger = rollout.replace(guidance=3.0)
    Player(stronger, params, given, {"text": one}, key, {"text": null}).play()
    assert stream_module._generate._cache_size() == programs + 1  # any weight shares it


@pytest.mark.parametrize("given", [0, 1])
def test_chunks_share_one_program(workdir, given):
    """From a picture or from noise, the second chunk is not compiled anew."""
    model = stored.find(workdir)
    params, rollout = model.load(), generate.for_stage(model.network(), model.config, steps=2)
    context = np.zeros((3, given, 32, 32, 3), np.uint8)  # 3: a batch that no other test has
    condition = {"actions": np.zeros((3, given), np.int32)}
    before = stream_module._generate._cache_size()
    player = Player(rollout, params, context, condition, jax.random.key(0))
    for _ in range(3):
        player.play(np.zeros((3, 1), np.int32))
    assert stream_module._generate._cache_size() <= before + 1


def test_the_model_runs_as_asked(workdir, tmp_path, caplog):
    flags = ["--window=5", "--sink=2", "--guidance=3", "--attention=reference", "--steps=2"]
    with pytest.raises(UserError, match=r"--guidance: .* was trained with config\.drop_rate=0"):
        stream(workdir, *flags)
    none = command.parse([f"--workdir={workdir}", "--guidance=1"])
    model = stored.find(workdir)
    assert command.load(none, model, model.network())[0].guidance is None
    folder = shutil.copytree(workdir, tmp_path / "dropped")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"drop_rate": 0.1}))
    with mock.patch.object(command, "Player", side_effect=UserError) as player:
        with pytest.raises(UserError):
            stream(folder, *flags, "--cache_dtype=int8")
    rollout = player.call_args.args[0]
    pattern, dit = rollout.network.pattern, rollout.network.dit
    assert (pattern.window, pattern.sink, rollout.guidance) == (5, 2, 3.0)
    assert "--window is" not in caplog.text
    command.as_asked(command.parse([f"--workdir={folder}", "--window=9"]), model.network())
    assert "--window is 9; the model was trained with 6 and has never" in caplog.text
    assert (dit.attention, dit.cache_dtype) == ("reference", "int8")
    assert rollout.sampler.steps == 2


def test_actions_are_read_and_repeated():
    options = command.parse(["--workdir=x", "--actions=4x2,1"])
    taken = command.steering(options, 5)
    assert [next(taken) for _ in range(7)] == [4, 4, 1, 4, 4, 1, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frames=0"], "--frames is 0; it must be at least 1"),
        (["--frames=-3"], "--frames is -3"),
        (["--steps=0"], "--steps is 0"),
        (["--steps=1000000000"], "--steps is 1000000000; it must be at most 1000"),
        (["--scale=3000"], "--scale is 3000; it must be at most 64"),
        (["--actions=7"], "7 is out of range; the model knows 0 to 4"),
        (["--actions=left"], "'left' is neither a NUMBER from 0 on nor NUMBERxTIMES"),
        (["--actions=4x0"], "names no action"),
        (["--actions=4x"], "'4x' is neither a NUMBER from 0 on nor NUMBERxTIMES"),
        ([f"--actions={'1' * 5000}"], "neither a NUMBER from 0 on nor NUMBERxTIMES"),
        (["--actions=²"], "neither a NUMBER from 0 on nor NUMBERxTIMES"),
        (["--seed=-1"], "--seed is -1"),
        (["--guidance=101"], "--guidance is 101; it must be 0 to 100"),
        (["--window=2", "--sink=2"], "--window, --sink: a window of 2 frames cannot hold a sink"),
        (["--window=3", "--sink=2"], r"pattern.window is 3: .* no chunk sees the frame before it"),
        (["--first_frame=nowhere.png"], "nowhere.png"),
        (["--out=/proc/x.mp4"], "/proc/x.mp4"),
        (["--out=x.gif"], "--out=x.gif: the video is an MP4; give a name that ends in .mp4"),
        (["--mesh=rows=2"], "--mesh=rows=2: 'rows=2' is none of data=N"),
    ],
)
def test_refusals(workdir, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        stream(workdir, "--steps=1", *arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--out=nowhere/x.mp4", "nowhere is not a directory"),
        ("--actions=9", "9 is out of range"),
        ("--first_frame=nowhere.png", "nowhere.png cannot be read"),
        ("--text=x.npy", "--text: the model takes none"),
    ],
)
def test_what_cannot_be_is_told_before_the_model_is_loaded(workdir, monkeypatch, argument, message):
    monkeypatch.setattr(stored.Stored, "load", None)
    with pytest.raises(UserError, match=message):
        command.run(command.parse([f"--workdir={workdir}", argument]))


def test_damaged_data_are_told(workdir, tmp_path):
    """Where there are none, a stream starts from noise; where they are damaged, it does not."""
    shutil.copytree(workdir.parent, tmp_path / "run")
    fields = json.loads((tmp_path / "run/stage1/config.json").read_text())
    fields["data"]["directory"] = str(tmp_path / "run/data")
    (tmp_path / "run/stage1/config.json").write_text(json.dumps(fields))
    [records] = (tmp_path / "run/data").rglob("*test.array_record*")
    records.write_bytes(records.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot read record 0"):
        stream(tmp_path / "run/stage1", "--frames=1", "--steps=1")
    shutil.rmtree(tmp_path / "run/data")
    assert len(stream(tmp_path / "run/stage1", "--frames=1", "--steps=1")) == 1


@pytest.mark.parametrize(
    ("group", "field", "value", "message"),
    [
        ("model", "foo", 1, "config.json is damaged, config.model: .*'foo'"),
        ("model", "dim", "x", "config.json is damaged, model.dim is 'x'; it must be at least 1"),
        ("model", "dim", 48, r"is of another model: parameter .* is float32\[.*24.*\] there"),
        ("pattern", "window", None, "the model's pattern has no window"),
        (None, "stage", "bidirectional", "damaged, pattern.chunk of stage 0 is 1, not null"),
        ("data", "name", None, "it has no field data.name"),
        ("data", "channels", None, "it has no field data.channels"),
        (None, "guidance", None, "it has no field guidance"),
    ],
)
def test_a_configuration_that_is_not_the_models(workdir, tmp_path, group, field, value, message):
    stored.export(workdir, tmp_path / "export")
    fields = json.loads((tmp_path / "export/config.json").read_text())
    in_group = fields[group] if group else fields
    in_group.pop(field, None)
    if value is not None:
        in_group[field] = value
    (tmp_path / "export/config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=message):
        command.run(command.parse([f"--checkpoint={tmp_path / 'export'}", "--frames=1"]))


def write_student(net, folder):
    """An export of a network with random parameters, which takes no actions."""
    model = {field.name: getattr(net.dit, field.name) for field in dataclasses.fields(net.dit)}
    for field in ("parent", "name", "num_actions"):
        del model[field]
    fields = {
        "stage": "consistency", "model": model, "pattern": {"window": 3}, "shift": 3.0,
        "init_from": {}, "data": {"name": "", "directory": "", "channels": net.dit.channels},
    }  # fmt: skip
    stored.write(ml_collections.ConfigDict(fields), tiny.params(net), folder)


def test_a_stored_model_may_leave_its_number_of_actions_to_the_networks_default(tmp_path):
    write_student(tiny.network(Pattern(window=3), channels=3, num_actions=0), tmp_path / "export")
    arguments = [f"--checkpoint={tmp_path / 'export'}", f"--out={tmp_path / 'x.mp4'}", "--scale=1"]
    command.run(command.parse([*arguments, "--frames=2"]))
    assert len(imageio.imread(tmp_path / "x.mp4")) == 2
    with pytest.raises(UserError, match="--actions: the model takes none"):
        command.run(command.parse([*arguments, "--actions=1"]))
    with pytest.raises(UserError, match="--text: the model takes none"):
        command.run(command.parse([*arguments, "--text=x.npy"]))


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """An export of a student of latents and texts, a text and a latent to start from."""
    folder = tmp_path_factory.mktemp("told")
    net = tiny.network(Pattern(window=3), num_actions=0, text_dim=7)
    write_student(net, folder / "export")
    rng = np.random.default_rng(0)
    np.save(folder / "text.npy", rng.standard_normal((3, 7), np.float32))
    np.save(folder / "latent.npy", rng.standard_normal((8, 12, 2)).astype(np.float16))
    return folder


def stream_told(folder, *arguments):
    options = [f"--checkpoint={folder / 'export'}", "--frames=4", "--steps=2", *arguments]
    command.run(command.parse(options))


@pytest.mark.parametrize("given", [0, 1])
def test_latents_stream_from_a_text(told, given):
    start = [f"--first_frame={told / 'latent.npy'}"] * given
    out = told / "x.npy"
    stream_told(told, f"--text={told / 'text.npy'}", f"--out={out}", *start)
    model = stored.find(told / "export")
    network = model.network()
    player = Player(
        generate.for_stage(network, model.config, 2),
        network.for_inference(model.load()),
        np.load(told / "latent.npy")[None, None, :][:, :given].astype(np.float32),
        {"text": np.load(told / "text.npy")[None]},
        jax.random.key(0),
    )
    expected = np.concatenate([player.play()[0] for _ in range(4)])
    np.testing.assert_array_equal(np.load(out), expected)
    assert np.load(out).dtype == np.float32


def test_a_text_is_filled_up_to_the_length_of_training(told, tmp_path):
    folder = tmp_path / "five"
    shutil.copytree(told / "export", folder / "export")
    fields = json.loads((folder / "export/config.json").read_text())
    fields["data"]["text_tokens"] = 5
    (folder / "export/config.json").write_text(json.dumps(fields))
    text, videos = np.load(told / "text.npy"), []
    for rows in (0, 2, 3):
        np.save(tmp_path / "text.npy", np.pad(text, ((0, rows), (0, 0))))
        arguments = f"--text={tmp_path / 'text.npy'}", f"--out={tmp_path / 'x.npy'}"
        if rows == 3:
            with pytest.raises(UserError, match="6 tokens; the model was trained with 5"):
                stream_told(folder, *arguments)
        else:
            stream_told(folder, *arguments)
            videos.append(np.load(tmp_path / "x.npy"))
    np.testing.assert_array_equal(*videos)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"^--text is missing, and an export comes without data; give an \.npy of embeddings"),
        (["--text=nowhere.npy"], r"^nowhere\.npy cannot be read as an npy file \(.*No such file"),
        (["--text=latent.npy"], r"float16 \[8, 12, 2\], but the model wants floats \[any, 7\]$"),
        (["--first_frame=text.npy"], r"\[3, 7\], but the model wants floats \[8, 12, 2\]$"),
        (["--first_frame=export/config.json"], r"config\.json cannot be read as an npy file"),
        (["--out=x.mp4"], r"^--out=x\.mp4: latents are an NPY; give a name that ends in \.npy$"),
        (["--guidance=2"], "^in a student guidance is distilled"),
    ],
)
def test_refusals_of_latents(told, monkeypatch, arguments, message):
    monkeypatch.chdir(told)
    text = ["--text=text.npy"] if arguments else []
    with pytest.raises(UserError, match=message) as error:
        stream_told(told, *text, *arguments)
    assert "\n" not in str(error.value)


def test_no_model(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        command.run(command.parse([f"--workdir={tmp_path / 'nothing'}"]))
