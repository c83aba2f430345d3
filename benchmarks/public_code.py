"""The paper's PyTorch code beside ours, in one run: Wan 1.3B on a GPU, the 20M network on a CPU.

    git clone https://github.com/thu-ml/Causal-Forcing
    python benchmarks/public_code.py Causal-Forcing

Needs the test extra (PyTorch, diffusers). Of the clone only the network runs, `CausalWanModel`,
with random parameters. On a GPU its network is compiled for the rollout, as its demo offers, and
attends to the cache by PyTorch's own FlashAttention; on a CPU all its attention is PyTorch's own,
in training by a dense mask. Medians go to `benchmarks/results/public_code_SIZE_PLATFORM.json`.
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

from cfpp.errors import exit_on_user_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE, FIRST_STEPS = ("wan_1_3b", 4) if DEVICE == "cuda" else ("20m", 2)


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
        if DEVICE == "cpu":
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
        self.dtype = getattr(torch, config.dtype)
        self.model.to(DEVICE, self.dtype)
        self.model.freqs = self.model.freqs.to(DEVICE)
        self.tokens = config.height * config.width // config.patch**2
        self.text = [self.normal(self.text_length, config.text_dim)]

    def _masked(self, query, key, value, block_mask):
        if block_mask not in self.masks:
            at = torch.arange(query.shape[2])
            self.masks[block_mask] = block_mask.mask_mod(0, 0, at[:, None], at[None])
        return Unsliced(attend(query, key, value, self.masks[block_mask]))

    def normal(self, *shape: int) -> torch.Tensor:
        """Random numbers."""
        return torch.randn(shape, device=DEVICE, dtype=self.dtype)

    def noise(self, frames: int) -> torch.Tensor:
        """Random latents."""
        return self.normal(1, self.config.channels, frames, self.config.height, self.config.width)

    @torch.no_grad()
    def stream(self) -> dict:
        """Seconds from frame to frame of a 2-step rollout; passes between them write the cache."""
        config, length = self.config, self.frames * self.tokens
        heads, width = config.heads, config.dim // config.heads
        keys_of = lambda size: torch.zeros(1, size, heads, width, device=DEVICE, dtype=self.dtype)
        index = lambda: torch.zeros(1, dtype=torch.long, device=DEVICE)
        cache = [
            dict(k=keys_of(length), v=keys_of(length), global_end_index=index(),
                 local_end_index=index())
            for _ in range(config.layers)
        ]  # fmt: skip
        cross = [dict(is_init=False) for _ in range(config.layers)]
        times = [now()]
        for i in range(self.frames):
            evaluate = lambda x, sigma, i=i: self.model(
                x, t=torch.full((1, 1), 1000 * sigma, device=DEVICE), context=self.text,
                seq_len=length, kv_cache=cache, crossattn_cache=cross,
                current_start=i * self.tokens,
            )  # fmt: skip
            x = self.noise(1)
            sigmas = np.linspace(1, 0, (2 if i else FIRST_STEPS) + 1).tolist()
            for sigma, after in itertools.pairwise(sigmas):
                x = (1 - after) * (x - sigma * evaluate(x, sigma)) + after * self.noise(1)
            times.append(now())  # the frame is there; ours writes its cache later too
            evaluate(x, 0.0)
        first, *later = np.diff(times)
        return {"first_frame_seconds": first, "later_frame_seconds": np.mean(later)}

    def training_step(self, optimizer) -> float:
        """Seconds of a teacher-forced step."""
        begin = now()
        clean, noise = self.noise(self.frames), self.noise(self.frames)
        sigma = torch.rand(1, self.frames, device=DEVICE)
        at = sigma[:, None, :, None, None].to(self.dtype)
        v = self.model(
            (1 - at) * clean + at * noise, t=1000 * sigma, context=self.text,
            seq_len=2 * self.frames * self.tokens, clean_x=clean,
        )  # fmt: skip
        F.mse_loss(v, noise - clean).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return now() - begin


def now() -> float:
    """The time when all work is done."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    """Reads the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=pathlib.Path, help="a clone of thu-ml/Causal-Forcing")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    measuring.check_public_code(options.checkout)
    public = Public(options.checkout)
    results = measuring.machine()
    name = f"public_code_{SIZE}_{results['platform']}"

    if DEVICE == "cuda":
        public.model.compile()
    public.stream()
    turns = [
        (public.stream(), rollout.stream(SIZE, "auto", FIRST_STEPS)) for _ in range(options.turns)
    ]
    for part in ("first_frame_seconds", "later_frame_seconds"):
        results[part] = summary([(theirs[part], ours[part]) for theirs, ours in turns])
        print(part, measuring.rounded(results[part]))

    measuring.write(name, results)

    del public
    theirs = train(options.checkout, options.turns)
    memory = measuring.peak_gib()  # of the whole process, whose most hungry part that was
    if DEVICE == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.empty_cache()  # ours needs memory too
    ours = [rollout.training_step(SIZE, "auto") for _ in range(options.turns)]
    seconds = [step["seconds"] for step in ours]
    results["training_step_seconds"] = summary(list(zip(theirs, seconds, strict=True)))
    results["training_step_gib"] = {
        "public": memory,
        "cfpp": ours[0]["state_gib"] + ours[0]["temporary_gib"],
    }
    print("training step", measuring.rounded(results["training_step_seconds"]))
    measuring.write(name, results)


def train(checkout: pathlib.Path, steps: int) -> list[float]:
    """Seconds of each of their training steps, but for the first, which compiles its attention."""
    public = Public(checkout)
    public.model.gradient_checkpointing = DEVICE == "cuda"
    optimizer = torch.optim.AdamW(public.model.parameters(), 1e-4)
    return [public.training_step(optimizer) for _ in range(1 + steps)][1:]


def summary(turns: list[tuple[float, float]]) -> dict:
    """Medians, and the median of the turns' own ratios."""
    theirs, ours = np.transpose(turns).tolist()
    return {
        "public": statistics.median(theirs),
        "cfpp": statistics.median(ours),
        "public_over_cfpp": statistics.median(np.divide(theirs, ours).tolist()),
    }


if __name__ == "__main__":
    with exit_on_user_error():
        main()
