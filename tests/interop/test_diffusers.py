"""The network and the noise levels against the `diffusers` library's own, with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfpp import flow
from cfpp.attention.pattern import Pattern
from cfpp.interop import diffusers as interop
from cfpp.interop.diffusers import from_diffusers, to_diffusers
from cfpp.stages import consistency, dmd
from tests.tiny import close

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

CHANNELS, TEXT_DIM = 4, 20
CHUNKS = (0, 1, 1)  # which chunk a frame belongs to, where networks are teacher-forced


def random_wan(heads: int, head_dim: int, layers: int, seed: int = 0):
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
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def evaluate(model, x, t, text):
    """The model's velocity, channels last."""
    return model(x.movedim(-1, 1), t, text, return_dict=False)[0].movedim(1, -1)


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
    net, params = interop.network(state_dict(model), Pattern(), height, width, head_dim)
    assert (net.dit.heads, net.dit.layers, net.dit.ffn_dim) == (heads, layers, 48)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, frames, height, width, CHANNELS), np.float32)
    text = rng.standard_normal((2, length, TEXT_DIM), np.float32)
    velocity = jax.jit(
        lambda sigma: net.bidirectional(params, {"text": jnp.asarray(text)})(x, sigma)
    )

    def theirs(t):
        with torch.no_grad():
            return evaluate(model, torch.tensor(x), torch.tensor(t), torch.tensor(text)).numpy()

    t = np.array([731.25, 96.5], np.float32)
    close(velocity(jnp.repeat(t[:, None] / 1000, frames, 1)), theirs(t), 1e-4)
    t = rng.uniform(0, 1000, (2, frames)).astype(np.float32)
    close(velocity(t / 1000), theirs(t.repeat(net.dit.tokens, 1)), 1e-4)


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


class SharedPositions(torch.nn.Module):
    """Rotary angles of `[clean frames | noisy frames]`."""

    def __init__(self, rope):
        super().__init__()
        self.rope = rope

    def forward(self, x):
        return tuple(torch.cat([part, part], 1) for part in self.rope(x[:, :, : x.shape[2] // 2]))


class Masked:
    """Self-attention of `[clean frames | noisy frames]` by a dense mask of all their tokens."""

    def __init__(self, processor, tokens):
        frames = [(clean, chunk) for clean in (True, False) for chunk in CHUNKS]
        sees = lambda query, key: (
            key[1] < query[1] or (key[1] == query[1] and query[0]) if key[0] else query == key
        )
        mask = torch.tensor([[sees(query, key) for key in frames] for query in frames])
        self.mask = mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
        self.processor = processor

    def __call__(self, attn, hidden_states, text=None, mask=None, rotary_emb=None):
        return self.processor(attn, hidden_states, text, self.mask, rotary_emb)


class Setting:
    """Three networks on both sides, and two clips with texts and what to guide away from.

    They see the whole clip at one noise level, or are teacher-forced on it, chunk by chunk.
    """

    size = (3, 4, 6)
    names = "student", "ema", "teacher"

    def __init__(self, forced=False):
        self.models = {n: random_wan(2, 12, 2, seed) for seed, n in enumerate(self.names)}
        self.params = {n: from_diffusers(state_dict(m)) for n, m in self.models.items()}
        rng = np.random.default_rng(0)
        draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
        self.x0, self.noise = draw(2, 2, *self.size, CHANNELS)
        self.texts = draw(2, 2, 5, TEXT_DIM)  # conditional, unconditional
        self.forced = forced
        pattern, student = Pattern(chunk=2, first_chunk=1), self.models["student"]
        self.net, _ = interop.network(state_dict(student), pattern, *self.size[1:], 12)
        if forced:
            for model in self.models.values():
                model.rope = SharedPositions(model.rope)
                for block in model.blocks:
                    block.attn1.processor = Masked(block.attn1.processor, self.net.dit.tokens)

    def ours(self, params, guidance=1.0):
        given, null = ({"text": jnp.asarray(text)} for text in self.texts)
        if self.forced:
            return self.net.teacher_forced(params, self.x0, given, guidance, null)
        return self.net.bidirectional(params, given, guidance, null)

    def theirs(self, name, x, sigma, guidance=1.0):
        frames, t = x.shape[1], 1000 * sigma[:, 0]
        if self.forced:
            x = torch.cat([torch.tensor(self.x0), x], 1)
            t = 1000 * torch.cat([0 * sigma, sigma], 1)
            t = t.repeat_interleave(self.net.dit.tokens, 1)
        cond, uncond = (
            evaluate(self.models[name], x, t, torch.tensor(text))[:, -frames:]
            for text in self.texts
        )
        return cond if guidance == 1.0 else uncond + guidance * (cond - uncond)

    def assert_gradients(self, gradient):
        ours = to_diffusers(gradient, patch=2)
        for name, parameter in self.models["student"].named_parameters():
            close(ours[name], parameter.grad.numpy(), 1e-4)


at = lambda sigma: sigma[..., None, None, None]


both = pytest.mark.parametrize("forced", [False, True], ids=["bidirectional", "teacher-forced"])


@both
def test_consistency_loss_and_its_gradients(forced):
    """Stage 2 by PyTorch's own differentiation: target, loss, the gradient of all parameters."""
    here, guidance = Setting(forced), 3.0
    grid = flow.grid(48, 5.0)
    k = np.array([[30, 47, 47], [12, 40, 40]] if forced else [[30] * 3, [47] * 3])
    indices = jnp.asarray(k)

    def loss(params):
        fields = (here.ours(params), here.ours(here.params["ema"]),
                  here.ours(here.params["teacher"], guidance))  # fmt: skip
        value = consistency.loss(*fields, here.x0, here.noise, indices, jnp.asarray(grid))
        return jnp.mean(value)

    value, gradient = jax.jit(jax.value_and_grad(loss))(here.params["student"])

    s, s_next = torch.tensor(grid[k]), torch.tensor(grid[k + 1])
    x0, noise = torch.tensor(here.x0), torch.tensor(here.noise)
    x = (1 - at(s)) * x0 + at(s) * noise
    with torch.no_grad():
        x_next = x - at(s - s_next) * here.theirs("teacher", x, s, guidance)
        target = x_next - at(s_next) * here.theirs("ema", x_next, s_next)
    theirs = ((x - at(s) * here.theirs("student", x, s) - target) ** 2).mean()
    theirs.backward()
    close(value, theirs.item(), 1e-4)
    here.assert_gradients(gradient)


@both
def test_matching_gradient_and_critic_loss(forced):
    """Stage 3's gradient with respect to the sample, and its critic's loss and all gradients."""
    here, guidance = Setting(forced), 4.0
    sigma = [[0.9, 0.3, 0.3], [0.5, 0.7, 0.7]] if forced else [[0.9] * 3, [0.3] * 3]
    sigma = np.array(sigma, np.float32)
    levels = jnp.asarray(sigma)

    @jax.jit
    def ours(params):
        critic = lambda p: jnp.mean(flow.matching_loss(here.ours(p), here.x0, here.noise, levels))
        real = here.ours(here.params["teacher"], guidance)
        g = dmd.gradient(real, here.ours(params), here.x0, here.noise, levels)
        return g, jax.value_and_grad(critic)(params)

    g, (critic_loss, gradient) = ours(here.params["student"])

    s = torch.tensor(sigma)
    x0, noise = torch.tensor(here.x0), torch.tensor(here.noise)
    x = (1 - at(s)) * x0 + at(s) * noise
    v = here.theirs("student", x, s)
    with torch.no_grad():
        x0_real = x - at(s) * here.theirs("teacher", x, s, guidance)
        scale = (x0 - x0_real).abs().mean((1, 2, 3, 4), keepdim=True)
        close(g, ((x - at(s) * v - x0_real) / scale).numpy(), 1e-4)
    theirs = ((v - (noise - x0)) ** 2).mean()
    theirs.backward()
    close(critic_loss, theirs.item(), 1e-4)
    here.assert_gradients(gradient)
