"""The network against numbers that the paper's public PyTorch code computed with random weights."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfpp import flow
from cfpp.attention.pattern import Pattern
from cfpp.interop import wan
from cfpp.models.dit import DiT
from cfpp.models.network import Network
from cfpp.rollout.generate import Rollout, Sampler
from tests.tiny import close

REFERENCE = pathlib.Path(__file__).parents[3] / "shared" / "reference"
pytestmark = pytest.mark.skipif(not REFERENCE.is_dir(), reason="no reference numbers beside this")


def array(file: str, name: str) -> np.ndarray:
    """A reference array; video becomes channels-last."""
    value = np.load(REFERENCE / f"{file}.npz")[name]
    return np.moveaxis(value, -3, -1) if value.ndim >= 5 else value


def weights():
    return pytest.importorskip("safetensors.numpy").load_file(REFERENCE / "weights_A.safetensors")


def network(**pattern) -> Network:
    dit = DiT(
        channels=16, height=8, width=12, patch=2, dim=96, ffn_dim=160, heads=4, layers=2,
        text_dim=32,
    )  # fmt: skip
    return Network(dit, Pattern(**pattern))


def condition():
    return {"text": jnp.asarray(array("inputs", "cond"))}


def test_weights_there_and_back():
    original = weights()
    back = wan.to_wan(wan.from_wan(original), patch=2)
    assert back.keys() == original.keys()
    for name, value in original.items():
        np.testing.assert_array_equal(back[name], value.astype(np.float32))


def test_bidirectional():
    net, params = network(), wan.from_wan(weights())
    x, t = array("inputs", "noise"), array("a_bidirectional", "t")
    sigma = np.repeat(t[:, None] / 1000, 6, 1)
    velocity = jax.jit(lambda p: net.bidirectional(p, condition())(x, sigma))(params)
    close(velocity, array("a_bidirectional", "flow"), 1e-4)


def test_teacher_forced():
    net, params = network(), wan.from_wan(weights())
    clean, noisy = array("inputs", "clean"), array("b_tf_framewise", "noisy")
    sigma = array("b_tf_framewise", "timestep") / 1000
    velocity = jax.jit(lambda p: net.teacher_forced(p, clean, condition())(noisy, sigma))(params)
    close(velocity, array("b_tf_framewise", "flow"), 1e-4)


def test_rollout_with_cache():
    """Two steps a frame, the reference's own noises."""
    net, params = network(), wan.from_wan(weights())
    noise, renoise = array("e_kv_framewise", "noise"), array("e_kv_framewise", "renoise")
    levels = flow.schedule([1000, 500], 5.0)
    rollout = Rollout(net, Sampler.create(levels, levels, flow.consistency_step), fused=False)
    table = jnp.stack([jnp.moveaxis(jnp.asarray(noise), 1, 0)[:, :, None], renoise], 1)

    def run(params):
        text = {"text": jnp.asarray(array("e_kv_framewise", "cond"))}
        start = rollout.start(params, jnp.zeros((2, 0, 8, 12, 16)), text, slots=6)
        at = lambda frame, step: table[frame, jnp.minimum(step, 1)]
        sigmas = jnp.tile(rollout.sampler.sigmas[1], (6, 1))
        return rollout.unroll(params, start, text, 6, at, sigmas, np.full(6, 1))[1].x0

    close(jax.jit(run)(params), array("e_kv_framewise", "output"), 1e-4)


def test_sigma_tables():
    close(flow.grid(48, 5.0)[:-1], array("h_scheduler", "n48_sigmas"), 1e-6)
    warped = 1000 * flow.schedule([1000, 750, 500, 250], 5.0)[:-1]
    close(warped, array("h_scheduler", "warped_1000_750_500_250"), 1e-6)
