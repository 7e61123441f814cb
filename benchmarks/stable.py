"""Cost of a stable target beside a training step, in time and memory.

    python benchmarks/stable.py                           on a GPU if there is one, else on the CPU
    python benchmarks/stable.py --sizes 64 32 64 10000    batch, side of the images, channels, size of the data set

A step is forward, backward and Adam of `networks.UNet` on a batch of images, with the noise as its target; a call turns
that into a stable target. Both take turns in one run: compare the ratios, the seconds are those of this machine.
"""

import argparse
import sys
from collections.abc import Callable

import torch
from common import headline, interleaved, peak_memory, peak_of

from stablefield import Pool, StableTarget
from stablefield.networks import UNet
from stablefield.stable import Bank

CLASSES = 10


def loop(device: str, batch: int, side: int, channels: int, points: int) -> dict[str, Callable[[], object]]:
    """A step, and a call for each kind of references."""
    torch.manual_seed(0)
    data = torch.rand(points, 3, side, side) * 2 - 1
    labels = torch.arange(points) % CLASSES
    index = torch.randperm(points)[:batch]
    x = data[index].to(device)
    noise, sigma = torch.randn_like(x), torch.rand(batch, device=device) * 2 + 0.05
    x_t = x + sigma[:, None, None, None] * noise
    network = UNet((3, side, side), channels=channels).to(device)
    optimizer = torch.optim.Adam(network.parameters())

    def step() -> None:
        optimizer.zero_grad()
        (network(x_t, sigma.log() / 4) - noise).square().mean().backward()
        optimizer.step()

    def call(references: object, label: torch.Tensor | None = None, **options: object) -> Callable[[], object]:
        stable, where = StableTarget(references, checks=0, **options), index.to(device)
        return lambda: stable(noise, x_t, x, alpha=1.0, sigma=sigma, index=where, label=label)

    return {
        "a training step": step,
        "minibatch": call(None),
        "minibatch, labels": call(None, (index % CLASSES).to(device)),
        "Bank(1,024)": call(Bank(1024)),
        "tensor, 256 drawn": call(data, size=256),
        "tensor, 1,024 drawn": call(data, size=1024),
        "tensor on the device, 1,024": call(data.to(device), size=1024),
        "tensor, 256 per label": call(data, index % CLASSES, size=256, labels=labels),
        "tensor, all data": call(data, size=None),
        "pool, all data (exact)": call(Pool(data), size=None),
    }


def extra_memory(name: str, sizes: list[int], device: str) -> float:
    """MB that one call takes at most, beyond what is held before."""
    if device == "cpu":
        return peak_memory(__file__, "--peak", name, *map(str, sizes))
    work = loop(device, *sizes)[name]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def report_peak(name: str, sizes: list[int]) -> None:
    """Run one part once and print the memory that it took (after a small one that loads the libraries)."""
    loop("cpu", 4, 8, 8, 20)[name]()
    print(peak_of(loop("cpu", *sizes)[name]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs=4, default=[64, 32, 64, 10_000], metavar="N")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peak", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        sys.exit(report_peak(options.peak[0], list(map(int, options.peak[1:]))))
    where = "cuda" if torch.cuda.is_available() else "cpu"
    batch, side, channels, _ = options.sizes
    print(headline(__file__))
    print(f"B = {batch}, D = {3 * side**2:,}, UNet of {channels} channels on {where}\n")
    times = interleaved(loop(where, *options.sizes), options.repeats)
    memory = {name: extra_memory(name, options.sizes, where) for name in times}
    print(f"  {'':30} {'ms':>9} {'of a step':>10} {'extra MB':>9} {'of a step':>10}")
    for name, (middle, _, _) in times.items():
        share = middle / times["a training step"][0], memory[name] / memory["a training step"]
        print(f"  {name:30} {1e3 * middle:9.2f} {share[0]:10.1%} {memory[name]:9.1f} {share[1]:10.1%}")
