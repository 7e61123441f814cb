"""Time and memory of `posterior`, against the formula written out.

    python benchmarks/posterior.py            on a GPU if there is one, else on the CPU

The written-out form computes all differences x_t - x_k at once, (B, n, D). Compare ratios within one run; the seconds
are those of this machine.
"""

import argparse
import sys

import torch
from common import headline, interleaved, peak_memory, peak_of

from stablefield import posterior

BATCH, DIM = 64, 3072


def written_out(x_t: torch.Tensor, support: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The posterior mean from all differences at once, in the data's own precision."""
    difference = x_t[:, None] - support[None]
    weight = torch.softmax(-difference.square().sum(2) / (2 * sigma[:, None] ** 2), 1)
    return (weight[:, :, None] * support[None]).sum(1)


def kernel(x_t: torch.Tensor, support: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The posterior mean from the package."""
    return posterior(x_t, support, sigma=sigma).mean


def inputs(n: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_t, support and sigma: noisy candidates of a random support, at intermediate noise levels."""
    torch.manual_seed(0)
    support = torch.rand(n, DIM) * 2 - 1
    sigma = torch.logspace(-1, 1.5, BATCH)
    x_t = support[torch.randint(n, (BATCH,))] + sigma[:, None] * torch.randn(BATCH, DIM)
    return x_t.to(device), support.to(device), sigma.to(device)


def speed(device: str, repeats: int) -> None:
    x_t, support, sigma = inputs(1024, device)
    found = interleaved(
        {
            "written out": lambda: written_out(x_t, support, sigma),
            "stablefield": lambda: kernel(x_t, support, sigma),
        },
        repeats,
    )
    for name, (middle, low, high) in found.items():
        print(f"  {name:12} {1e3 * middle:9.2f} ms   ({1e3 * low:.2f} to {1e3 * high:.2f})")
    print(f"  ratio        {found['written out'][0] / found['stablefield'][0]:9.1f} times faster\n")


def memory(device: str) -> None:
    if device == "cpu":
        used = {name: peak_memory(__file__, "--peak", name) for name in ("written-out", "stablefield")}
    else:
        used = {name: cuda_peak(name) for name in ("written-out", "stablefield")}
    for name, megabytes in used.items():
        print(f"  {name:12} {megabytes:9.1f} MB")
    print(f"  ratio        1/{used['written-out'] / used['stablefield']:.0f}\n")


def cuda_peak(name: str) -> float:
    x_t, support, sigma = inputs(1024, "cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    form = written_out if name == "written-out" else kernel
    form(x_t, support, sigma)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def report_peak(name: str) -> None:
    """Run one form once and print the memory that it took (after a small call that loads the libraries)."""
    x_t, support, sigma = inputs(1024, "cpu")
    posterior(x_t[:2], support[:2], sigma=sigma[:2])
    written_out(x_t[:2], support[:2], sigma[:2])
    form = written_out if name == "written-out" else kernel
    print(peak_of(lambda: form(x_t, support, sigma)))


def growth(device: str, repeats: int) -> None:
    print(f"  {'n':>7} {'ms':>9} {'Gflop/s':>9} {'extra MB':>9}")
    for n in (64, 256, 1024, 4096, 16384, 50000):
        x_t, support, sigma = inputs(n, device)
        middle, _, _ = interleaved({"": lambda s=(x_t, support, sigma): posterior(s[0], s[1], sigma=s[2])}, repeats)[""]
        extra = peak_memory(__file__, "--peak-of", str(n)) if device == "cpu" else float("nan")
        print(f"  {n:7} {1e3 * middle:9.2f} {4 * BATCH * n * DIM / middle / 1e9:9.0f} {extra:9.1f}")
    print()


def report_peak_of(n: int) -> None:
    x_t, support, sigma = inputs(n, "cpu")
    posterior(x_t[:2], support[:2], sigma=sigma[:2])
    print(peak_of(lambda: kernel(x_t, support, sigma)))


def products(device: str, repeats: int) -> None:
    """Rate of the kernel's two matrix products in the installed libraries, for the size of one call."""
    x_t, support, _ = inputs(1024, device)
    weight = torch.rand(BATCH, 1024, device=device)
    wide = [tensor.double() for tensor in (x_t, support, weight)]
    candidates = {
        "torch float32": lambda: (x_t @ support.T, weight @ support),
        "torch float64": lambda: (wide[0] @ wide[1].T, wide[2] @ wide[1]),
    }
    if device == "cpu":
        narrow_np = [t.numpy() for t in (x_t, support, weight)]
        wide_np = [t.numpy() for t in wide]
        candidates["numpy float32"] = lambda: (narrow_np[0] @ narrow_np[1].T, narrow_np[2] @ narrow_np[1])
        candidates["numpy float64"] = lambda: (wide_np[0] @ wide_np[1].T, wide_np[2] @ wide_np[1])
        try:
            import faiss

            # faiss has distances only, which are the first product; the second is numpy's
            candidates["faiss float32"] = lambda: (
                faiss.pairwise_distances(narrow_np[0], narrow_np[1]),
                narrow_np[2] @ narrow_np[1],
            )
        except ImportError:
            print("  (faiss is not installed: pip install '.[faiss]')")
    candidates["stablefield, complete"] = lambda: posterior(x_t, support, sigma=1.0)
    flops = 4 * BATCH * 1024 * DIM
    for name, work in candidates.items():
        # one library after the other: threads of several libraries that take turns wait for each other
        middle, _, _ = interleaved({name: work}, repeats)[name]
        print(f"  {name:22} {1e3 * middle:9.2f} ms {flops / middle / 1e9:9.0f} Gflop/s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        sys.exit(report_peak(options.peak))
    if options.peak_of:
        sys.exit(report_peak_of(options.peak_of))
    where = "cuda" if torch.cuda.is_available() else "cpu"
    print(headline(__file__))
    print(f"Time at B = {BATCH}, n = 1,024, D = {DIM:,} (median, minimum and maximum, taking turns)")
    speed(where, options.repeats)
    print("Peak memory beyond the inputs")
    memory(where)
    print(f"Against the size of the support, B = {BATCH}, D = {DIM:,}")
    growth(where, options.repeats)
    print("The two matrix products alone, n = 1,024")
    products(where, options.repeats)
