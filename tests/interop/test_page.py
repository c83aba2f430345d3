"""The tables of docs/interop.md say what to call for each quantity, and it can be called."""

import functools
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfpp import flow
from cfpp.attention.pattern import Pattern, teacher_forced_entries
from cfpp.errors import UserError
from cfpp.interop import wan
from cfpp.models.network import Network
from cfpp.rollout.generate import Rollout
from cfpp.rollout.sampler import consistency
from cfpp.stages import consistency as stage2
from cfpp.stages import dmd, ode
from cfpp.train import stored
from configs import stage0, stage1
from tests import tiny

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "interop.md"
LINES = re.findall(r"^\| ([^|]+) \| `([^`]+)` \|$", PAGE.read_text(), re.MULTILINE)
PARENT, STREAM = re.findall(r"```python\n(.+?)```", PAGE.read_text(), re.DOTALL)
FRAMES, CHUNKS = 6, 2


@functools.cache
def names():
    """What the expressions speak of: a tiny network and arrays."""
    sizes = dict(num_actions=0, text_dim=5, patch=2, layers=1)
    net = tiny.network(Pattern(chunk=3), **sizes)
    params, rollout = tiny.params(net), Rollout(net, consistency(2, 5.0), fused=False)
    clean, noise, x = (tiny.latents(net, FRAMES, seed=seed) for seed in range(3))
    text, null = ({"text": jnp.full((2, 4, 5), value)} for value in (0.5, -0.5))
    sigma, last = jnp.full((2, FRAMES), 0.5), np.ones(CHUNKS, int)
    noise_of = tiny.noise_table(net, FRAMES, 2)
    stream = rollout.start(params, clean[:, :0], text, FRAMES)
    field = net.teacher_forced(params, clean, text)
    return dict(
        wan=wan, flow=flow, consistency=stage2, ode=ode, dmd=dmd,
        Pattern=Pattern, teacher_forced_entries=teacher_forced_entries,
        weights=wan.to_wan(params, 2), height=8, width=12, head_dim=12,
        net=net, params=params, rollout=rollout, stream=stream,
        cache=net.dit.cache(2, FRAMES), condition=text, null=null, guidance=3.0,
        slots=FRAMES, frames=FRAMES,
        given=clean[:, :3], clean=clean, noise=noise, noise_of=noise_of, x=x, inputs=x, endpoint=x,
        x0=x[:, :3], frame=np.arange(3), level=jnp.zeros((2, 3)), sigma=sigma, last=last,
        sigmas=jnp.asarray(rollout.sampler.sigmas), grid=jnp.asarray(flow.grid(4, 5.0)),
        index=jnp.zeros((2, FRAMES), int), both=jnp.concatenate([clean, x], 1),
        levels=jnp.concatenate([sigma, sigma], 1), teacher=field, student=field, ema=field,
        real=field, fake=field, nearest=lambda s: s,
        rounded=lambda s: s.astype(jnp.bfloat16),
    )  # fmt: skip


def test_the_page_has_its_tables():
    assert len(LINES) == 21


@pytest.mark.parametrize(("quantity", "expression"), LINES, ids=[name for name, _ in LINES])
def test_it_can_be_called(quantity, expression):
    """Traced, not run: what it returns is tested elsewhere."""
    found, known = [], dict(names())
    jax.eval_shape(lambda: found.append(eval(expression, known)))
    if "loss" in expression:
        assert found[0].shape == (2, FRAMES)


def test_its_program_writes_a_parent(tmp_path, monkeypatch):
    """With a tiny network in place of Wan 1.3B's, whose heads are as wide."""
    config = stage1.get_config("arena,smoke")
    config.data.num_actions = 0
    config.model.update({"text_dim": 5, "dim": 256, "heads": 2})
    net = Network.create(config.model, config.pattern)
    params = nn.meta.unbox(jax.jit(net.init)(jax.random.key(0)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stage0, "get_config", lambda arg: config.copy_and_resolve_references())
    exec(PARENT, {"weights": wan.to_wan(params, config.model.patch)})
    written = stored.find("runs/wan")
    found = written.load()
    assert written.config.stage == config.stage
    jax.tree.map(np.testing.assert_array_equal, found, params)
    with pytest.raises(UserError, match="runs/wan exists and is not overwritten"):
        stored.write(config, params, "runs/wan")
    config.model.layers = 3
    with pytest.raises(UserError, match="the given network is of another model: parameter blocks"):
        stored.write(config, params, "runs/other")


def test_its_program_streams(monkeypatch):
    """With a tiny network, whose heads are as wide as Wan's, in the public code's names."""
    torch = pytest.importorskip("torch")
    net = tiny.network(dim=128, heads=1, num_actions=0, text_dim=5)
    weights = wan.to_wan(tiny.params(net), net.dit.patch)
    found = {f"model.{name}": torch.from_numpy(x) for name, x in weights.items()}
    monkeypatch.setattr(torch, "load", lambda path, map_location: {"generator_ema": found})
    size = f"height, width = {net.dit.height}, {net.dit.width}"
    names = {"text": np.zeros((1, 4, 5)), "other_text": np.ones((1, 4, 5))}
    exec(STREAM.replace("height, width = 60, 104", size), names)
    assert names["latents"].shape == (1, 1, net.dit.height, net.dit.width, net.dit.channels)
    assert np.isfinite(names["latents"]).all()
