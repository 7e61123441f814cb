"""Cost of class-conditional stable targets for latents beside a training step of a transformer, as for ImageNet.

    python benchmarks/latents.py                               1,000 classes of 1,300 latents 4 x 16 x 16
    python benchmarks/latents.py --classes 100 --side 32       fewer classes, latents 4 x 32 x 32

A step is forward, backward and AdamW of a SiT-S/2 (12 layers of width 384, patches of 2 x 2, adaptive normalisation;
Ma et al. 2024) that predicts the velocity of a rectified flow. Latents are drawn in every step from a memory map of
means and standard deviations, as bytes, and so are the references. The latents are random, because times do not depend
on their values. The file is written to a temporary folder. All parts take turns in one run. Times are seconds of the
processor, because those of the clock depend on what else the machine does: compare the ratios.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import headline
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from stablefield import StableTarget

CHANNELS = 4


class Block(nn.Module):
    """A transformer block whose normalisations are shifted, scaled and gated by a condition."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate, shift_2, scale_2, gate_2 = self.modulation(silu(condition))[:, None].chunk(6, -1)
        qkv = self.qkv(self.norms[0](h) * (1 + scale) + shift).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = h + gate * self.out(scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2))
        return h + gate_2 * self.mlp(self.norms[1](h) * (1 + scale_2) + shift_2)


class Transformer(nn.Module):
    """SiT: patches, a position for each, blocks conditioned on time and class, and patches again."""

    def __init__(self, side: int, classes: int, width: int = 384, depth: int = 12, heads: int = 6) -> None:
        super().__init__()
        self.patches = nn.Conv2d(CHANNELS, width, 2, 2)
        self.position = nn.Parameter(0.02 * torch.randn((side // 2) ** 2, width))
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes + 1, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.out = nn.ConvTranspose2d(width, CHANNELS, 2, 2)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        angles = 1000 * t[:, None] * torch.exp(torch.linspace(0, -9.2, 128, device=t.device))
        condition = self.time(torch.cat([angles.cos(), angles.sin()], 1)) + self.label(label)
        h = self.patches(x)
        tokens = h.flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            tokens = block(tokens, condition)
        return self.out(tokens.transpose(1, 2).unflatten(2, h.shape[2:]))


def write_moments(path: Path, points: int, side: int) -> np.ndarray:
    """A memory map (points, 8, side, side) of bytes: means, and standard deviations."""
    source = np.random.default_rng(0)
    moments = np.lib.format.open_memmap(path, "w+", np.uint8, (points, 2 * CHANNELS, side, side))
    for start in range(0, points, 10_000):
        part = moments[start : start + 10_000]
        part[:] = np.frombuffer(source.bytes(part.size), np.uint8).reshape(part.shape)
    moments.flush()
    return np.load(path, mmap_mode="r")


def means_of(moments: Tensor) -> Tensor:
    """Latents without their randomness."""
    return moments[:, :CHANNELS].float().div_(64).sub_(2)


def drawn_from(moments: Tensor, generator: torch.Generator | None = None, rows: int = 256) -> Tensor:
    """Latents drawn from their means and standard deviations.

    One draw of noise serves every `rows` latents: no two candidates of an example share it, and no more is needed.
    """
    latents = means_of(moments)
    noise = torch.randn(min(rows, len(latents)), *latents.shape[1:], device=latents.device, generator=generator)
    for latent, std in zip(latents.split(rows), moments[:, CHANNELS:].split(rows), strict=True):
        latent.addcmul_(std, noise[: len(latent)], value=2.0**-12)
    return latents


def parts(moments: np.ndarray, labels: Tensor, batch: int, repeats: int) -> dict[str, Callable[[], object]]:
    """A step, and a call for each number of references; every call has other examples."""
    torch.manual_seed(0)
    network = Transformer(moments.shape[-1], int(labels.max()) + 1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

    def noisy() -> tuple[Tensor, ...]:
        index = torch.randint(len(moments), (batch,))
        x = drawn_from(torch.from_numpy(moments)[index])
        noise, t = torch.randn_like(x), torch.rand(batch)
        s = t[:, None, None, None]
        return noise - x, (1 - s) * x + s * noise, x, t, index

    def step() -> None:
        target, x_t, _, t, index = noisy()
        optimizer.zero_grad()
        (network(x_t, t, labels[index]) - target).square().mean().backward()
        optimizer.step()

    def call(size: int | None, transform: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        options = {"labels": labels, "size": size, "transform": transform, "checks": 0}
        stable, batches = StableTarget(moments, "velocity", **options), iter([noisy() for _ in range(repeats + 1)])

        def work() -> Tensor:
            target, x_t, x, t, index = next(batches)
            return stable(target, x_t, x, alpha=1 - t, sigma=t, index=index, label=labels[index])

        return work

    draw = partial(drawn_from, generator=torch.Generator().manual_seed(0))
    return {
        "a training step": step,
        "256 of each class": call(256, draw),
        "256, means": call(256, means_of),
        "all of each class": call(None, draw),
        "all, means": call(None, means_of),
    }


def processor_seconds(candidates: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median processor seconds of each candidate, over rounds in which each runs once, after a warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, work in candidates.items():
            start = time.process_time()
            work()
            times[name] += [time.process_time() - start] if turn else []
    return {name: statistics.median(values) for name, values in times.items()}


def seconds_of_draws(classes: int, batch: int, repeats: int) -> float:
    """Seconds of a call with 16 references of 4 numbers from each class: little more than the host's work."""
    labels = torch.arange(130 * classes) % classes
    data = torch.randn(len(labels), 4)
    stable = StableTarget(data, labels=labels, size=16, checks=0)

    def work() -> None:
        index = torch.randint(len(data), (batch,))
        x, noise = data[index], torch.randn(batch, 4)
        stable(noise, x + noise, x, alpha=1.0, sigma=1.0, index=index, label=labels[index])

    return processor_seconds({"": work}, repeats)[""]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--per-class", type=int, default=1300)
    parser.add_argument("--side", type=int, default=16)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(headline(__file__))
    with tempfile.TemporaryDirectory() as folder:
        points = options.classes * options.per_class
        moments = write_moments(Path(folder) / "moments.npy", points, options.side)
        size = f"{options.classes:,} classes of {options.per_class:,} latents {(CHANNELS, *moments.shape[2:])}"
        print(f"{size}, {moments.nbytes / 2**30:.2f} GB of moments, B = {options.batch}\n")
        labels = torch.arange(points) % options.classes
        times = processor_seconds(parts(moments, labels, options.batch, options.repeats), options.repeats)
    for name, seconds in times.items():
        print(f"  {name:20} {seconds:8.3f} s  {seconds / times['a training step']:7.2%} of a step")
    print("\n  the host's work in a call, 16 references of 4 numbers per class:")
    for classes in (10, 100, 1000, 10_000):
        print(f"  {classes:6,} classes {1e3 * seconds_of_draws(classes, options.batch, 20):8.2f} ms")
