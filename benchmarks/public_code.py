"""The paper's PyTorch code beside ours, in one run, on a CPU: the 20M network.

    git clone https://github.com/thu-ml/Causal-Forcing
    python benchmarks/public_code.py Causal-Forcing

Needs the test extra (PyTorch, diffusers). Of the clone only the network runs, `CausalWanModel`,
with random parameters. Its attention needs a GPU; here it is PyTorch's own in float32, with a dense
mask in training. Theirs and ours take turns, and the medians are written to
`benchmarks/results/public_code_20m_cpu.json`.
"""

import argparse
import itertools
import pathlib
import statistics
import sys
import time
import types

import measuring
import numpy as np
import rollout
import torch
from torch.nn import functional as F

SIZE = "20m"


class Unsliced:
    """The output of an attention without padding: theirs cuts off `[:, :, :-0]`, which is all."""

    def __init__(self, out):
        self.out = out

    def __getitem__(self, _):
        return self.out


def attend(q, k, v, mask=None):
    """Attention of `[B, N, length, D]`."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attend_flat(q, k, v, **_):
    """Attention of `[B, length, N, D]`."""
    return attend(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


class Public:
    """Their network at the size of ours."""

    def __init__(self, checkout: pathlib.Path):
        for name in ("wan", "wan.modules"):  # without what their __init__ files import
            package = types.ModuleType(name)
            package.__path__ = [str(checkout.joinpath(*name.split(".")))]
            sys.modules[name] = package
        from wan.modules import causal_model, model

        model.flash_attention = causal_model.attention = attend_flat
        causal_model.flex_attention = self._masked
        self.masks = {}
        self.config = config = rollout.job(SIZE, "auto").model
        _, self.frames, self.text_length = rollout.SIZES[SIZE]
        self.model = causal_model.CausalWanModel(
            text_len=self.text_length, in_dim=config.channels, out_dim=config.channels,
            dim=config.dim, ffn_dim=config.ffn_dim, freq_dim=config.frequency_dim,
            text_dim=config.text_dim, num_heads=config.heads, num_layers=config.layers,
            cross_attn_norm=True,
        )  # fmt: skip
        self.tokens = config.height * config.width // config.patch**2
        self.text = [torch.randn(self.text_length, config.text_dim)]

    def _masked(self, query, key, value, block_mask):
        if block_mask not in self.masks:
            at = torch.arange(query.shape[2])
            self.masks[block_mask] = block_mask.mask_mod(0, 0, at[:, None], at[None])
        return Unsliced(attend(query, key, value, self.masks[block_mask]))

    def noise(self, frames: int) -> torch.Tensor:
        """Random latents."""
        return torch.randn(1, self.config.channels, frames, self.config.height, self.config.width)

    @torch.no_grad()
    def stream(self) -> float:
        """Seconds a frame of a 2-step rollout, whose third pass writes the cache."""
        config, length = self.config, self.frames * self.tokens
        heads, width = config.heads, config.dim // config.heads
        keys_of = lambda size: torch.zeros(1, size, heads, width)
        index = lambda: torch.zeros(1, dtype=torch.long)
        cache = [
            dict(k=keys_of(length), v=keys_of(length), global_end_index=index(),
                 local_end_index=index())
            for _ in range(config.layers)
        ]  # fmt: skip
        cross = [dict(is_init=False) for _ in range(config.layers)]
        begin = time.perf_counter()
        for i in range(self.frames):
            evaluate = lambda x, sigma, i=i: self.model(
                x, t=torch.full((1, 1), 1000 * sigma), context=self.text, seq_len=length,
                kv_cache=cache, crossattn_cache=cross, current_start=i * self.tokens,
            )  # fmt: skip
            x = self.noise(1)
            for sigma, after in itertools.pairwise((1.0, 5 / 6, 0.0)):
                x = (1 - after) * (x - sigma * evaluate(x, sigma)) + after * self.noise(1)
            evaluate(x, 0.0)
        return (time.perf_counter() - begin) / self.frames

    def training_step(self, optimizer) -> float:
        """Seconds of a teacher-forced step."""
        begin = time.perf_counter()
        clean, noise = self.noise(self.frames), self.noise(self.frames)
        sigma = torch.rand(1, self.frames)
        at = sigma[:, None, :, None, None]
        v = self.model(
            (1 - at) * clean + at * noise, t=1000 * sigma, context=self.text,
            seq_len=2 * self.frames * self.tokens, clean_x=clean,
        )  # fmt: skip
        F.mse_loss(v, noise - clean).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - begin


def main() -> None:
    """Reads the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=pathlib.Path, help="a clone of thu-ml/Causal-Forcing")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    public = Public(options.checkout)
    optimizer = torch.optim.AdamW(public.model.parameters(), 1e-4)

    public.stream()
    turns = [
        (public.stream(), rollout.stream(SIZE, "auto", 2)["later_frame_seconds"])
        for _ in range(options.turns)
    ]
    results = measuring.machine() | {"stream": summary(turns, "seconds_a_frame")}
    print("stream:", measuring.rounded(results["stream"]))
    turns = [
        (public.training_step(optimizer), rollout.training_step(SIZE, "auto")["seconds"])
        for _ in range(options.turns)
    ]
    results["training_step"] = summary(turns, "seconds")
    results["peak_gib_together"] = measuring.peak_gib()
    print("training step:", measuring.rounded(results["training_step"]))
    measuring.write(f"public_code_{SIZE}_cpu", results)


def summary(turns: list[tuple[float, float]], unit: str) -> dict:
    """Medians, and the median of the turns' own ratios."""
    theirs, ours = np.transpose(turns).tolist()
    return {
        f"public_{unit}": statistics.median(theirs),
        f"cfpp_{unit}": statistics.median(ours),
        "public_over_cfpp": statistics.median(np.divide(theirs, ours).tolist()),
    }


if __name__ == "__main__":
    main()
