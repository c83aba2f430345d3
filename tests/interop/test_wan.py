"""The network against numbers that the paper's public PyTorch code computed with random weights."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfpp import flow
from cfpp.attention.pattern import CLEAN, Pattern, teacher_forced_entries
from cfpp.errors import UserError
from cfpp.interop import diffusers, wan
from cfpp.models.network import Network
from cfpp.rollout.generate import Rollout
from cfpp.rollout.sampler import Sampler
from tests.tiny import close

REFERENCE = pathlib.Path(__file__).parents[3] / "shared" / "reference"
pytestmark = pytest.mark.skipif(not REFERENCE.is_dir(), reason="no reference numbers beside this")


def array(file: str, name: str) -> np.ndarray:
    """A reference array; video becomes channels-last."""
    value = np.load(REFERENCE / f"{file}.npz")[name]
    return np.moveaxis(value, -3, -1) if value.ndim >= 5 else value


def weights():
    return pytest.importorskip("safetensors.numpy").load_file(REFERENCE / "weights_A.safetensors")


def network() -> tuple[Network, dict]:
    return wan.network(weights(), Pattern(), height=8, width=12, head_dim=24)


def condition():
    return {"text": jnp.asarray(array("inputs", "cond"))}


def test_weights_there_and_back():
    original = weights()
    back = wan.to_wan(wan.from_wan(original), patch=2)
    assert back.keys() == original.keys()
    for name, value in original.items():
        np.testing.assert_array_equal(back[name], value.astype(np.float32))


def test_names_of_diffusers():
    original = weights()
    names = json.loads((REFERENCE / "diffusers_key_map.json").read_text())
    assert names.keys() == original.keys()
    renamed = diffusers.to_diffusers(wan.from_wan(original), patch=2)
    assert renamed.keys() == set(names.values())
    for name, theirs in names.items():
        np.testing.assert_array_equal(renamed[theirs], original[name].astype(np.float32))


def test_sizes_are_those_of_the_weights():
    net, params = network()
    sizes = dict(channels=16, patch=2, dim=96, ffn_dim=160, heads=4, layers=2, frequency_dim=256)
    assert {name: getattr(net.dit, name) for name in sizes} == sizes and net.dit.text_dim == 32
    renamed = diffusers.to_diffusers(params, patch=2)
    assert diffusers.network(renamed, Pattern(), 8, 12, 24)[0] == net
    with pytest.raises(ValueError, match="a width of 96 does not split into heads of 128"):
        wan.network(weights(), Pattern(), 8, 12)
    for missing in ("time_embedding.0.weight", "modulation"):
        lacking = {name: x for name, x in weights().items() if not name.endswith(missing)}
        with pytest.raises(ValueError, match=f"the weights lack .*{missing}"):
            wan.network(lacking, Pattern(), 8, 12, 24)
    short = weights() | {"head.head.bias": np.zeros(3, np.float32)}
    with pytest.raises(UserError, match=r"head/bias is float32\[3\] there and float32\[64\] in"):
        wan.network(short, Pattern(), 8, 12, 24)


def table(name: str, t: np.ndarray) -> np.ndarray:
    """The reference's slip: it reads sigma and weight from the entry of its 1000 nearest to t."""
    shift = {"train": 5.0, "shift8": 8.0}[name.split("_")[0]]
    nearest = np.abs(1000 * flow.grid(1000, shift)[:-1] - t[..., None]).argmin(-1)
    return array("h_scheduler", name)[nearest]


def test_bidirectional():
    net, params = network()
    x, t = array("inputs", "noise"), array("a_bidirectional", "t")
    sigma = np.repeat(t[:, None] / 1000, 6, 1)
    velocity = jax.jit(lambda p: net.bidirectional(p, condition())(x, sigma))(params)
    close(velocity, array("a_bidirectional", "flow"), 1e-4)
    # Its scores convert to x0 by the table of another shift: nearest, and off by up to 1e-3.
    theirs = array("a_bidirectional", "x0_shift8")
    slipped = table("shift8_sigmas", t)[:, None].repeat(6, 1)
    close(flow.to_x0(x, velocity, slipped), theirs, 1e-4)
    assert np.abs(flow.to_x0(x, velocity, sigma) - theirs).max() > 1e-3 * np.abs(theirs).max()


def test_teacher_forced():
    """Stage 1 as the reference trains it: noised data, velocity, x0, weighted loss, gradients."""
    net, params = network()
    clean, noise = array("inputs", "clean"), array("inputs", "noise")
    theirs = lambda name: array("b_tf_framewise", name)
    sigma, weight = theirs("timestep") / 1000, table("train_weights", theirs("timestep"))
    np.testing.assert_array_equal(weight, theirs("weight"))
    noisy = flow.interpolate(clean, noise, sigma)
    close(noisy, theirs("noisy"), 1e-6)

    def loss(params):
        velocity = net.teacher_forced(params, clean, condition())
        error = flow.matching_loss(velocity, clean, noise, sigma)
        v = velocity(noisy, sigma)
        return jnp.mean(error * weight), (v, flow.to_x0(noisy, v, sigma), error)

    (value, (v, x0, error)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    close(v, theirs("flow"), 1e-4)
    close(x0, theirs("x0"), 1e-4)
    close(error, theirs("per_frame_mse"), 1e-4)
    close(value, theirs("loss"), 1e-4)
    gradient = wan.to_wan(gradient, patch=2)
    close(gradient["head.head.weight"], theirs("grad_head_w"), 1e-4)
    close(gradient["blocks.0.modulation"], theirs("grad_blk0_mod"), 1e-4)
    close(gradient["blocks.0.self_attn.k.bias"], theirs("grad_blk0_k_b"), 1e-4)


def test_history_at_another_time():
    """The reference's `aug_t`: the clean frames as they are, but told a noise level."""
    net, params = network()
    levels = [array("b_tf_framewise", name) / 1000 for name in ("aug_t", "timestep")]
    sigma = np.concatenate(levels, 1)
    x = np.concatenate([array("inputs", "clean"), array("b_tf_framewise", "noisy")], 1)

    def run(params):
        text = net.text(params, condition())
        return net.apply(params, x, sigma, *teacher_forced_entries(6), None, text)[0][:, 6:]

    close(jax.jit(run)(params), array("b_tf_framewise", "flow_aug"), 1e-4)


def test_mask():
    """The reference pads to 384 tokens; ours are the first 2 x 6 x 24."""
    packed, shape = (array("b_tf_framewise", name) for name in ("mask", "mask_shape"))
    theirs = np.unpackbits(packed, axis=1)[:, : shape[1]]
    entries = teacher_forced_entries(6)
    ours = Pattern().mask(entries, entries).repeat(24, 0).repeat(24, 1)
    np.testing.assert_array_equal(ours, theirs[:288, :288])


def kv_noise() -> jax.Array:
    """The rollout's noises `[frame, step, B, H, W, C]`: what it starts from, and renoises by."""
    noise, renoise = array("e_kv_framewise", "noise"), array("e_kv_framewise", "renoise")
    return jnp.stack([jnp.moveaxis(jnp.asarray(noise), 1, 0), renoise[:, :, 0]], 1)


def test_rollout_with_cache():
    """Two steps a frame, the reference's own noises."""
    net, params = network()
    levels = flow.schedule([1000, 500], 5.0)
    close(1000 * levels[:-1], array("e_kv_framewise", "steps"), 1e-6)
    noise = kv_noise()
    text = {"text": jnp.asarray(array("e_kv_framewise", "cond"))}
    sampler = Sampler.create(levels, levels, flow.consistency_step)

    def run(params, rollout):
        start = rollout.start(params, jnp.zeros((2, 0, 8, 12, 16)), text, slots=6)
        at = lambda frames, step: jnp.moveaxis(noise[frames, jnp.minimum(step, 1)], 0, 1)
        sigmas = jnp.tile(rollout.sampler.sigmas[1], (6, 1))
        return rollout.unroll(params, start, text, at, sigmas, np.full(6, 1))[1].x0

    for fused in (False, True):
        out = jax.jit(run)(params, Rollout(net, sampler, fused=fused))
        close(out, array("e_kv_framewise", "output"), 1e-4)


def test_every_call_of_the_rollout():
    """Two denoising calls a frame, and the one at t = 0 that fills the cache."""
    net, params = network()
    text = {"text": jnp.asarray(array("e_kv_framewise", "cond"))}
    noise, levels = kv_noise(), flow.schedule([1000, 500], 5.0)
    theirs = array("e_kv_framewise", "call_flow")
    np.testing.assert_array_equal(array("e_kv_framewise", "call_start"), np.arange(18) // 3 * 24)
    assert array("e_kv_framewise", "n_calls") == len(theirs)

    @jax.jit
    def call(cache, x, sigma, frame, copy):
        return net.apply(
            params, x, jnp.full((2, 1), sigma), frame, copy, None, net.text(params, text), cache
        )

    cache = net.dit.cache(2, 6)
    for i in range(6):
        frame, (x, renoise) = jnp.array([i]), noise[i][:, :, None]
        for step in range(3):
            sigma, is_clean = levels[step], step == 2
            assert 1000 * sigma == pytest.approx(array("e_kv_framewise", "call_timestep")[step])
            v, key_value = call(cache, x, sigma, frame, np.array([CLEAN if is_clean else 1]))
            close(v, theirs[3 * i + step], 1e-4)
            if not is_clean:
                level = jnp.full((2, 1), sigma)
                x = flow.consistency_step(x, v, level, 0 * level + levels[step + 1], renoise)
        close(x[:, 0], array("e_kv_framewise", "output")[:, i], 1e-4)
        cache = cache.write(frame, *key_value)


def test_sigma_tables():
    grid = flow.grid(48, 5.0)[:-1]
    close(grid, array("h_scheduler", "n48_sigmas"), 1e-6)
    close(1000 * grid, array("h_scheduler", "n48_timesteps"), 1e-6)
    warped = 1000 * flow.schedule([1000, 750, 500, 250], 5.0)[:-1]
    close(warped, array("h_scheduler", "warped_1000_750_500_250"), 1e-6)
    for name, shift in (("train", 5.0), ("shift8", 8.0)):
        t = 1000 * flow.grid(1000, shift)[:-1]
        close(t / 1000, array("h_scheduler", f"{name}_sigmas"), 1e-6)
        close(flow.bell_weight(t / 1000, shift), array("h_scheduler", f"{name}_weights"), 1e-5)
    close(1000 * flow.grid(1000, 5.0)[:-1], array("h_scheduler", "train_timesteps"), 1e-6)
    t = array("h_scheduler", "query_t")
    np.testing.assert_array_equal(table("train_sigmas", t), array("h_scheduler", "query_sigma"))
    np.testing.assert_array_equal(table("train_weights", t), array("h_scheduler", "query_weight"))
