"""The network and the noise levels against the `diffusers` library's own, with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfpp import flow
from cfpp.attention.pattern import Pattern
from cfpp.interop.diffusers import from_diffusers, to_diffusers
from cfpp.models.dit import DiT
from cfpp.models.network import Network
from tests.tiny import close

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

CHANNELS, TEXT_DIM = 4, 20


def random_wan(heads: int, head_dim: int, layers: int):
    """A `WanTransformer3DModel` in which no parameter is zero or one."""
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=32,
        ffn_dim=48,
        num_layers=layers,
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def state_dict(model):
    return {name: value.numpy() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("heads", "head_dim", "layers", "size", "length"),
    [
        (2, 12, 2, (3, 4, 6), 5),
        (1, 16, 1, (1, 6, 4), 1),  # side axes of 4, the frame's of 8
        (3, 24, 3, (5, 2, 8), 9),
    ],
)
def test_network(heads, head_dim, layers, size, length):
    """Float32 on both sides; one noise level a clip, as Wan 2.1 has, or one a frame."""
    model = random_wan(heads, head_dim, layers)
    frames, height, width = size
    dit = DiT(
        channels=CHANNELS, height=height, width=width, patch=2, dim=heads * head_dim, ffn_dim=48,
        heads=heads, layers=layers, frequency_dim=32, text_dim=TEXT_DIM,
    )  # fmt: skip
    net, params = Network(dit, Pattern()), from_diffusers(state_dict(model))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, frames, height, width, CHANNELS), np.float32)
    text = rng.standard_normal((2, length, TEXT_DIM), np.float32)
    velocity = jax.jit(
        lambda sigma: net.bidirectional(params, {"text": jnp.asarray(text)})(x, sigma)
    )

    def theirs(t):
        with torch.no_grad():
            video = torch.tensor(np.moveaxis(x, -1, 1))
            out = model(video, torch.tensor(t), torch.tensor(text), return_dict=False)[0]
        return np.moveaxis(out.numpy(), 1, -1)

    t = np.array([731.25, 96.5], np.float32)
    close(velocity(jnp.repeat(t[:, None] / 1000, frames, 1)), theirs(t), 1e-4)
    t = rng.uniform(0, 1000, (2, frames)).astype(np.float32)
    close(velocity(t / 1000), theirs(t.repeat(dit.tokens, 1)), 1e-4)


def test_weights_there_and_back():
    original = state_dict(random_wan(2, 12, 2))
    back = to_diffusers(from_diffusers(original), patch=2)
    assert back.keys() == original.keys()
    for name, value in original.items():
        np.testing.assert_array_equal(back[name], value)
    with pytest.raises(ValueError, match=r"'blocks.0.attn3.to_q.weight' is no tensor of Wan's"):
        from_diffusers({"blocks.0.attn3.to_q.weight": np.zeros(1)})


@pytest.mark.parametrize(("steps", "shift"), [(48, 5.0), (4, 8.0), (7, 1.0)])
def test_euler_scheduler(steps, shift):
    """Its table of noise levels is our grid, and its step our Euler step."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    np.testing.assert_allclose(scheduler.sigmas, flow.grid(1000, shift)[:-1], rtol=1e-6)
    scheduler.set_timesteps(sigmas=1 - np.arange(steps) / steps)
    grid = flow.grid(steps, shift)
    np.testing.assert_allclose(scheduler.sigmas, grid, rtol=1e-6)
    np.testing.assert_allclose(scheduler.timesteps, 1000 * grid[:-1], rtol=1e-6)
    x, v = np.random.default_rng(0).standard_normal((2, 1, 3, 2, 2, 1), np.float32)
    for k, t in enumerate(scheduler.timesteps):
        stepped = scheduler.step(torch.tensor(v), t, torch.tensor(x)).prev_sample.numpy()
        close(flow.euler_step(x, v, grid[k], grid[k + 1]), stepped)
        x = stepped
