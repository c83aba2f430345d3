"""The same work in plain PyTorch: what `benchmarks/rollout.py` is compared with.

    python benchmarks/torch_baseline.py            # 20M on a CPU, Wan 1.3B on a GPU

The network of `cfpp.models.dit`, written as one would in PyTorch: scaled_dot_product_attention with
a dense mask in training, and against a cache that grows in a rollout, with three passes a frame
(two steps, and one that writes the cache). Parameters and data are random, and nothing is compiled.
It checks no numbers: it is there for its speed, at equal shapes.

Writes `benchmarks/results/torch_SIZE_PLATFORM.json`.
"""

import argparse
import itertools
import resource
import time

import measuring
import numpy as np
import torch
from rollout import SIZES, job
from torch import nn
from torch.nn import functional as F

from cfpp.attention.pattern import Pattern, teacher_forced_entries


class Attention(nn.Module):
    """Attention with RMSNorm of queries and keys over the whole width."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim), nn.RMSNorm(dim)

    def split(self, x):
        """`[B, length, dim]` to `[B, N, length, D]`."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def join(self, q, k, v, mask=None):
        """Attends, and projects the output."""
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o(out.transpose(1, 2).flatten(2))


def rotate(x, rotation):
    """Rotates pairs of `x` `[B, N, length, D]` by the complex `rotation` `[length, D / 2]`."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


class Block(nn.Module):
    """One transformer block."""

    def __init__(self, dim: int, ffn_dim: int, heads: int):
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(6, dim) / dim**0.5)
        self.own, self.cross = Attention(dim, heads), Attention(dim, heads)
        self.cross_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim)
        )

    def forward(self, x, modulation, rotation, text, mask, cache):
        """Maps `[B, E, T, dim]`; returns it with all keys and values, those of `cache` first."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            part.unsqueeze(2) for part in (modulation + self.modulation).unbind(2)
        )
        norm = lambda x: F.layer_norm(x, x.shape[-1:], eps=1e-6)
        flat = (norm(x) * (1 + scale1) + shift1).flatten(1, 2)
        q = rotate(self.own.split(self.own.norm_q(self.own.q(flat))), rotation)
        k = rotate(self.own.split(self.own.norm_k(self.own.k(flat))), rotation)
        v = self.own.split(self.own.v(flat))
        if cache is not None:
            k, v = (torch.cat(pair, 2) for pair in zip(cache, (k, v), strict=True))
        x = x + self.own.join(q, k, v, mask).view_as(x) * gate1
        cross = self.cross
        q = cross.split(cross.norm_q(cross.q(self.cross_norm(x).flatten(1, 2))))
        text_k, text_v = cross.split(cross.norm_k(cross.k(text))), cross.split(cross.v(text))
        x = x + cross.join(q, text_k, text_v).view_as(x)
        return x + self.mlp(norm(x) * (1 + scale2) + shift2) * gate2, (k, v)


class DiT(nn.Module):
    """The transformer, from tokens of latents to tokens of velocities."""

    def __init__(self, config, tokens: int):
        super().__init__()
        dim, width = config.dim, config.channels * config.patch**2
        self.tokens, self.frequency_dim = tokens, config.frequency_dim
        self.head_dim = dim // config.heads
        self.patch_in, self.head = nn.Linear(width, dim), nn.Linear(dim, width)
        linear_pair = lambda a, b, act: nn.Sequential(nn.Linear(a, b), act, nn.Linear(b, b))
        self.time = linear_pair(config.frequency_dim, dim, nn.SiLU())
        self.text = linear_pair(config.text_dim, dim, nn.GELU(approximate="tanh"))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(
            Block(dim, config.ffn_dim, config.heads) for _ in range(config.layers)
        )
        self.remat = config.remat == "full"

    def forward(self, x, sigma, frame, text, mask=None, caches=None):
        """Velocity tokens of `x` `[B, E, T, width]`, and the keys and values of every block."""
        half = self.frequency_dim // 2
        frequency = 10000.0 ** (-torch.arange(half, device=x.device) / half)
        angle = 1000 * sigma[..., None].float() * frequency
        time = self.time(torch.cat([angle.cos(), angle.sin()], -1).to(x.dtype))
        modulation = self.modulation(time).unflatten(-1, (6, -1))
        # One rotation by the frame and the token stands for the three axes: the cost is the same.
        position = (frame[:, None] + torch.arange(self.tokens, device=x.device)).flatten()
        turns = torch.arange(self.head_dim // 2, device=x.device) / self.head_dim
        angles = position[:, None] * 10000.0**-turns
        rotation = torch.polar(torch.ones_like(angles), angles)
        h, text, written = self.patch_in(x), self.text(text), []
        for i, block in enumerate(self.blocks):
            arguments = h, modulation, rotation, text, mask, caches and caches[i]
            if self.remat and torch.is_grad_enabled():
                h, cache = torch.utils.checkpoint.checkpoint(block, *arguments, use_reentrant=False)
            else:
                h, cache = block(*arguments)
            written.append(cache)
        return self.head(h), written


class Baseline:
    """The network of a size on this machine's device, with random data."""

    def __init__(self, size: str):
        config = job(size, "auto").model
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = getattr(torch, config.dtype)
        _, self.frames, length = SIZES[size]
        self.tokens = config.height * config.width // config.patch**2
        self.width = config.channels * config.patch**2
        self.model = DiT(config, self.tokens).to(self.device)
        self.text = self.noise(1, length, config.text_dim)

    def noise(self, *shape):
        """Random numbers in the dtype of activations."""
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def wait(self) -> float:
        """The time when all work is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @torch.no_grad()
    def stream(self, first_steps: int, steps: int = 2) -> list[float]:
        """Seconds of each frame of a clip."""
        model = self.model.to(self.dtype)
        caches, times = None, [self.wait()]
        for i in range(self.frames):
            frame = torch.tensor([i], device=self.device)
            sigmas = np.linspace(1, 0, (steps if i else first_steps) + 1).tolist()
            level = lambda sigma: torch.full((1, 1), sigma, device=self.device)
            x = self.noise(1, 1, self.tokens, self.width)
            for sigma, after in itertools.pairwise(sigmas):
                v, _ = model(x, level(sigma), frame, self.text, caches=caches)
                x = (1 - after) * (x - sigma * v) + after * self.noise(*x.shape)
            _, caches = model(x, level(0.0), frame, self.text, caches=caches)
            times.append(self.wait())
        return list(np.diff(times))

    def training_step(self, repeats: int = 3) -> float:
        """Seconds of a teacher-forced step, the first not counted."""
        model = self.model.float()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
        frame, copy = teacher_forced_entries(self.frames)
        table = Pattern().mask((frame, copy), (frame, copy))
        mask = torch.tensor(table.repeat(self.tokens, 0).repeat(self.tokens, 1), device=self.device)
        frame = torch.tensor(frame, device=self.device)
        times = []
        for _ in range(1 + repeats):
            begin = self.wait()
            clean, noise = (self.noise(1, self.frames, self.tokens, self.width) for _ in range(2))
            sigma = torch.rand(1, self.frames, device=self.device)
            mixed = (1 - sigma[..., None, None]) * clean + sigma[..., None, None] * noise
            x = torch.cat([clean, mixed.to(self.dtype)], 1)
            sigma = torch.cat([torch.zeros_like(sigma), sigma], 1)
            with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
                v, _ = model(x, sigma, frame, self.text, mask)
            loss = F.mse_loss(v[:, self.frames :].float(), (noise - clean).float())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            times.append(self.wait() - begin)
        return float(np.median(times[1:]))

    def peak_gib(self) -> float:
        """As `measuring.peak_gib`, of PyTorch's device."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Reads the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "wan_1_3b" if torch.cuda.is_available() else "20m"
    parser.add_argument("--size", choices=SIZES, default=default)
    parser.add_argument("--first-steps", type=int, default=4, help="of the first frame")
    options = parser.parse_args()
    baseline = Baseline(options.size)
    baseline.stream(options.first_steps)
    first, *later = baseline.stream(options.first_steps)
    results = measuring.machine() | {
        "size": options.size,
        "threads": torch.get_num_threads(),
        "stream": {
            "first_steps": options.first_steps,
            "first_frame_seconds": first,
            "later_frame_seconds": float(np.mean(later)),
            "last_frame_seconds": later[-1],
        },
    }
    print("stream:", measuring.rounded(results["stream"]))
    results["training_step"] = {
        "seconds": baseline.training_step(),
        "peak_gib": baseline.peak_gib(),
    }
    print("training step:", measuring.rounded(results["training_step"]))
    measuring.write(f"torch_{options.size}_{baseline.device}", results)


if __name__ == "__main__":
    main()
