"""Cost of the exact target with isolation and screening, and its distance from the one that streams all data.

    python benchmarks/exact.py --cifar10 STORE --fashion-mnist FILE --only speed,step,error,size

The other parts are search, neighbours and reading. STORE is CIFAR-10 as written by `stablefield data convert`, FILE an
IDX file of Fashion-MNIST's images; parts whose data are not given are skipped. `reading` writes 1.5 GB to the folder
for temporary files. On a GPU, if there is one, the data are on it. On a CPU, seconds are processor time on one thread,
which other processes disturb less. Compare ratios within one run.
"""

import argparse
import itertools
import math
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import headline, peak_of
from torch import Tensor

import stablefield.pool
from stablefield import (
    VE,
    DSMTarget,
    ExactTarget,
    KNNTarget,
    NoisyBatch,
    Pool,
    Posterior,
    STFTarget,
    TargetEstimator,
)
from stablefield.build import build
from stablefield.config import override, resolve
from stablefield.data import IDX, Digits, Store
from stablefield.data.arrays import as_tensor, map_array
from stablefield.data.distances import NeighbourDistances
from stablefield.distributed import Ranks
from stablefield.engine import TrainState, train
from stablefield.pool import NULL_LABEL
from stablefield.process import per_example
from stablefield.recipes import read_recipe
from stablefield.seeding import generator
from stablefield.targets import Prefetched
from stablefield.targets.query import uses_int8
from stablefield.times import LogNormal, LogUniform, TimeDistribution

NOISES: dict[str, TimeDistribution] = {
    "EDM, exp(N(-1.2, 1.2))": LogNormal(-1.2, 1.2),
    "VE, 0.01 to 50": LogUniform(0.01, 50),
}
SIGMAS = (0.002, 0.02, 0.1, 0.3, 0.5, 0.7, 1, 1.4, 2, 2.8, 4, 5.6, 8, 16, 32, 80)

PREFETCHED = 1024  # examples whose targets a run computes together
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(work: Callable[[], object]) -> float:
    """Seconds of one call: processor time, or on a GPU the time until it has finished."""
    if DEVICE.type == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def on_device(pool: Pool) -> Pool:
    """The pool on the device of the examples."""
    return pool if DEVICE.type == "cpu" else pool.to(DEVICE)


def batch(pool: Pool, t: Tensor, seed: int = 0) -> NoisyBatch:
    """Noisy examples of a pool, one for each t."""
    g = generator(seed, "batch", len(t))
    index = torch.randint(len(pool), (len(t),), generator=g)
    x = pool.take(index).to(DEVICE)
    return VE().perturb(x, t.to(x), torch.randn(x.shape, generator=g).to(DEVICE), index=index)


def written_out(noisy: NoisyBatch, support: Tensor) -> Tensor:
    """The posterior mean over a reference batch from all differences at once, in float32."""
    difference = (noisy.x_t[:, None] - support).flatten(2)
    weight = torch.softmax(-difference.square().sum(2) / (2 * noisy.sigma[:, None] ** 2), 1)
    return (weight[:, :, None] * support.flatten(1)).sum(1)


def groups(pool: Pool, times: TimeDistribution, size: int, number: int = 4) -> list[list[NoisyBatch]]:
    """Batches of `size` examples, in groups whose targets a run computes together."""
    together = max(1, PREFETCHED // size)
    seeds = torch.arange(number * together).split(together)
    return [[batch(pool, times.draw(size, generator(seed, "t")), seed) for seed in some.tolist()] for some in seeds]


def as_in_a_run(exact: ExactTarget, some: list[NoisyBatch]) -> float:
    """Seconds per batch if the targets of all of these are computed together."""
    return seconds(lambda: Prefetched(exact, PREFETCHED).several(some)) / len(some)


class Products:
    """The posterior mean over fixed data from two products in float32: the data are held in float32, with their norms.

    Args:
        pool: the data.
        n: number of data points, from the first.
    """

    def __init__(self, pool: Pool, n: int) -> None:
        self.support = pool.take(torch.arange(n)).to(DEVICE).flatten(1)
        self.half_norms = self.support.square().sum(1) / 2

    def __call__(self, noisy: NoisyBatch) -> Tensor:
        energy = torch.addmm(self.half_norms, noisy.x_t.flatten(1), self.support.T, alpha=-1)
        return torch.softmax(-energy / noisy.sigma[:, None] ** 2, 1) @ self.support


def speed(pool: Pool, sizes: Sequence[int], rounds: int) -> None:
    """Seconds per batch of exact targets as in a run, and of the alternatives, in turns."""
    references = pool.take(torch.arange(1024)).to(DEVICE)
    some, every, exact = Products(pool, 1024), list[Products](), ExactTarget(pool)
    first = groups(pool, NOISES["EDM, exp(N(-1.2, 1.2))"], 64, 1)[0][0]
    for what, work in {
        "float32 copy and norms of all N": lambda: every.append(Products(pool, len(pool))),
        "exact: projection, coordinates, and the first batch": lambda: exact(first),
    }.items():
        spent, more = with_memory(work)
        print(f"  set-up, {what:52} {spent:8.3f} s   {more:6,.0f} MB")
    streamed, arithmetic = ExactTarget(pool, missing_mass=0), "int8" if uses_int8(pool, DEVICE) else "float"
    print(f"  products of exact targets: {arithmetic}; targets of {PREFETCHED:,} examples computed together in a run")
    for size in sizes:
        batches = {name: groups(pool, times, size, rounds) for name, times in NOISES.items()}
        ways: dict[str, Callable[[list[NoisyBatch]], object]] = {
            # 64 examples at a time, or the differences would need 38 GB for 512
            "n = 1,024, written-out differences": lambda group: [
                written_out(part, references) for part in _parts(group[0], 64)
            ],
            "n = 1,024, float32 products": lambda group: some(group[0]),
            "all N, float32 products": lambda group: every[0](group[0]),
            "all N, streamed (missing_mass=0)": lambda group: streamed(group[0]),
            "exact, one step at a time": lambda group: [exact(noisy) for noisy in group[:4]],
            "exact, as in a run": lambda group: Prefetched(exact, PREFETCHED).several(group),
        }
        found: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for turn, (way, work), (noise, many) in itertools.product(range(rounds), ways.items(), batches.items()):
            group = many[turn]
            if way.startswith("exact") or noise == next(iter(batches)):  # others take the same time for any noise
                steps = {"exact, as in a run": len(group), "exact, one step at a time": len(group[:4])}.get(way, 1)
                spent, more = with_memory(lambda work=work, group=group: work(group))
                found.setdefault((way, noise), []).append((spent / steps, more))
        for (way, noise), results in found.items():
            times, more = [spent for spent, _ in results], max(more for _, more in results)
            name = f"{way}, {noise.partition(',')[0]}'s noise" if way.startswith("exact") else way
            print(f"  B = {size:3}   {name:42} {spread(times, 3)}   {more:6,.0f} MB", flush=True)
    for examples in (1, 2, 4, 8):
        noisy = batch(pool, torch.full((examples,), 10.0))
        taken = statistics.median(seconds(lambda noisy=noisy: exact(noisy)) for _ in range(9))
        print(f"  sigma = 10, where all data matter, {examples} examples: {1e3 * taken:.0f} ms", flush=True)


def with_memory(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of one call, and its peak memory in MB beyond the memory before."""
    spent: list[float] = []
    more = peak_of(lambda: spent.append(seconds(work)))
    return spent[0], more


def _parts(noisy: NoisyBatch, size: int) -> list[NoisyBatch]:
    return [noisy.select(slice(start, start + size)) for start in range(0, len(noisy), size)]


def step(store: Path, pool: Pool, exact: ExactTarget, images: int = 16) -> None:
    """Time of exact targets beside a training step of the full-width NCSN++."""
    settings = ["data.kind=store", f"data.path={store}", f"training.batch_size={images}", "target.kind=dsm"]
    parts = build(resolve(override(read_recipe("cifar10-ncsnpp-edm-stf"), settings)), ranks=Ranks(DEVICE))
    steps = train(TrainState(parts.denoiser), parts.objective, parts.batches, images=10**12, seed=0)
    seconds(lambda: next(steps))
    an_image = statistics.mean(seconds(lambda: next(steps)) for _ in range(2)) / images
    numbers = sum(p.numel() for p in parts.denoiser.parameters())
    print(f"  NCSN++ of {numbers / 1e6:.1f} M parameters, {images} images per step: {an_image:.3f} s per image")
    for name, times in NOISES.items():
        for size in (64, 512):
            many = groups(pool, times, size)
            found = statistics.mean(as_in_a_run(exact, some) for some in many) / size
            share = f"{found / an_image:.2%} of that"
            print(f"  {name:23} B = {size:3}   {1e3 * found:.3f} ms an image, {share}", flush=True)


def error(pool: Pool, exact: ExactTarget, examples: int) -> None:
    """Largest difference from the target that streams all data, at each noise level."""
    streamed, known = ExactTarget(pool, missing_mass=0), exact._class(NULL_LABEL, DEVICE)
    rms = float(pool.take(torch.arange(min(5000, len(pool)))).flatten(1).square().sum(1).mean().sqrt())
    print("    sigma      ESS   isolated   shared   largest error / rms   s   of all N, s")
    for sigma in SIGMAS:
        noisy = batch(pool, torch.full((examples,), sigma), int(1000 * sigma))
        taken = [seconds(lambda target=target, noisy=noisy: target(noisy)) for target in (exact, streamed)]
        found, wanted = exact(noisy), streamed(noisy)
        off = (found.mean - wanted.mean).flatten(1).norm(dim=1).max() / rms
        isolated, shared = (100 * share.double().mean() for share in (known.level > sigma, found.ess > 1))
        print(
            f"  {sigma:7g} {wanted.ess.mean():8.1f}   {isolated:6.1f} %   {shared:5.1f} %   {off:19.1e}   "
            f"{taken[0]:5.3f}   {taken[1]:5.3f}",
            flush=True,
        )


def manifold(n: int, d: int, latent: int = 16) -> Pool:
    """Points on a curved surface of few dimensions, of standard deviation 0.5 in each of d."""
    g = generator(0, "manifold", n, d)
    z, first, second = torch.randn(n, latent, generator=g), *(torch.randn(latent, d, generator=g) for _ in range(2))
    x = torch.empty(n, d)
    for start in range(0, n, 4096):
        part = z[start : start + 4096]
        torch.sin(part @ first / latent**0.5 + part.square() @ second / latent, out=x[start : start + 4096])
    return Pool(x.mul_(0.7))


def tiled(pool: Pool, n: int) -> Pool:
    """n images: those of the pool, then all of them shifted sideways by one pixel, by two, and so on (cyclically)."""
    copies = [pool.data.roll(shift, -1) for shift in range(-(-n // len(pool)))]
    return Pool(torch.cat(copies)[:n], num_levels=pool.num_levels)


def size(pool: Pool, repeats: int) -> None:
    pool = on_device(pool)
    noise = NOISES["EDM, exp(N(-1.2, 1.2))"]
    many = [batch(pool, noise.draw(64, generator(seed, "t")), seed) for seed in range(repeats)]
    exact, streamed = ExactTarget(pool), ExactTarget(pool, missing_mass=0)
    ready = seconds(lambda: exact(many[0]))
    found = statistics.mean(seconds(lambda noisy=noisy: exact(noisy)) for noisy in many)
    whole = seconds(lambda: streamed(many[0]))
    print(
        f"  {len(pool):9,} {math.prod(pool.shape):7,}   {ready:7.2f} s   {1e3 * found:9.1f} ms   {1e3 * whole:10.1f} ms"
        f"   {whole / found:6.1f}",
        flush=True,
    )


def proposal(noisy: NoisyBatch, pool: Pool, nearest: Tensor, n: int, g: torch.Generator) -> Posterior:
    """Self-normalised importance sampling: n data points drawn from a proposal that depends on the k nearest.

    The proposal gives each of the k nearest its weight, and all others the smallest of these; draws are corrected by
    weight over proposal. After Niedoba et al. 2024, as we understand it. Consistent as n grows, biased for every n.
    """
    k = nearest.shape[1]
    support = pool.take(nearest.flatten()).unflatten(0, nearest.shape)
    log_w = -(noisy.x_t[:, None] - support).flatten(2).double().square().sum(2) / (2 * noisy.sigma[:, None] ** 2)
    log_q = torch.cat([log_w, log_w.amin(1, keepdim=True) + math.log(len(pool) - k)], 1)
    column = torch.multinomial(torch.softmax(log_q, 1), n, replacement=True, generator=g)
    other = torch.randint(len(pool), column.shape, generator=g)
    chosen = torch.where(column < k, nearest.gather(1, column.clamp(max=k - 1)), other)
    drawn = pool.take(chosen.flatten()).unflatten(0, chosen.shape)
    log_r = -(noisy.x_t[:, None] - drawn).flatten(2).double().square().sum(2) / (2 * noisy.sigma[:, None] ** 2)
    log_r -= torch.where(column < k, log_w.gather(1, column.clamp(max=k - 1)), log_w.amin(1, keepdim=True))
    r = torch.softmax(log_r, 1).float()
    mean = (per_example(r.flatten(), drawn.flatten(0, 1)).view(*r.shape, *[1] * len(pool.shape)) * drawn).sum(1)
    return Posterior(mean, 1 / r.square().sum(1), torch.zeros(len(mean)))


def search(pool: Pool, exact: ExactTarget) -> None:
    k, examples, g = 64, 64, generator(0, "proposal")
    indices = ("PCA64,Flat", "PCA64,IVF256,Flat")
    found = {name: KNNTarget(pool, k, search="faiss", index=name, probes=8) for name in indices}
    targets: dict[str, TargetEstimator] = {
        "single sample": DSMTarget(),
        "1,024 references": STFTarget(pool, 1024),
        "64 nearest": KNNTarget(pool, k),
        **{f"64 by {name}": target for name, target in found.items()},
    }
    for sigma in (1.4, 2.0, 2.8, 4.0, 8.0):
        noisy = batch(pool, torch.full((examples,), sigma), int(100 * sigma))
        wanted = exact(noisy).mean
        nearest = KNNTarget(pool, k).nearest(noisy, NULL_LABEL)
        print(f"  sigma = {sigma}")
        for name, target in targets.items():
            spent = seconds(lambda target=target, noisy=noisy: target(noisy, generator=g))
            off = (target(noisy, generator=g).mean - wanted).flatten(1).square().sum(1).mean()
            recall = ""
            if isinstance(target, KNNTarget) and target.search == "faiss":
                recall = f"   recall {_recall(target.nearest(noisy, NULL_LABEL), nearest):.2f}"
            print(f"    {name:24} mean squared distance to exact {off:8.2f}   {spent:6.2f} s{recall}", flush=True)
        off = (proposal(noisy, pool, nearest, 256, g).mean - wanted).flatten(1).square().sum(1).mean()
        print(f"    {'proposal from 64 nearest':24} mean squared distance to exact {off:8.2f}   (256 draws, biased)")


def _recall(listed: Tensor, nearest: Tensor) -> float:
    return float((listed[:, :, None] == nearest[:, None]).any(1).double().mean())


def reading(pool: Pool, copies: int = 10, repeats: int = 7) -> None:
    """Wall-clock time of data mapped from a file whose pages are in memory or not.

    The shifted copies are given the distances of the original images.
    """
    noisy, prefetch = batch(pool, torch.full((2,), 10.0)), stablefield.pool._prefetch
    ways_to_read = {"read ahead": prefetch, "not read ahead": lambda part: None}
    taken: dict[tuple[str, bool], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.npy"
        np.save(path, tiled(pool, copies * len(pool)).data.cpu().numpy())
        data, distances = as_tensor(map_array(path)), NeighbourDistances(pool, device=DEVICE)
        exact = ExactTarget(Pool(data, num_levels=pool.num_levels), lambda label: distances(label).repeat(copies, 1))
        exact(noisy)
        for _, (name, way), cold in itertools.product(range(repeats), ways_to_read.items(), (False, True)):
            stablefield.pool._prefetch = way
            taken.setdefault((name, cold), []).append(by_the_clock(path, data, cold, lambda: exact(noisy)))
        stablefield.pool._prefetch = prefetch
        print(f"  {len(data):,} data points, {data.nbytes / 1e9:.1f} GB      in memory              on the disk")
        print("  two examples that need all data")
        for name in ways_to_read:
            print(f"    {name:26}", *(spread(taken[name, cold]) for cold in (False, True)), flush=True)
        some, *_ = groups(Pool(pool.data, num_levels=pool.num_levels), NOISES["EDM, exp(N(-1.2, 1.2))"], 64, 1)
        ways: dict[str, list[Callable[[], object]]] = {
            "step by step": [partial(exact, noisy) for noisy in some],
            "together, as in a run": [lambda: Prefetched(exact, PREFETCHED).several(some)],
        }
        print(f"  {len(some)} steps of 64 examples of EDM's noise, seconds per step")
        for name, calls in ways.items():
            for _, cold in itertools.product(range(3), (False, True)):
                spent = sum(by_the_clock(path, data, cold, call) for call in calls)
                taken.setdefault((name, cold), []).append(spent / len(some))
            print(f"    {name:26}", *(spread(taken[name, cold]) for cold in (False, True)), flush=True)


def by_the_clock(path: Path, data: Tensor, cold: bool, work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call that reads from a file; if cold, none of its pages are in memory before."""
    if cold:
        drop_pages(path, data)
    start = time.perf_counter()
    work()
    if DEVICE.type != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def spread(times: list[float], digits: int = 2) -> str:
    """Median, minimum and maximum."""
    middle, low, high = (f"{value:.{digits}f}" for value in (statistics.median(times), min(times), max(times)))
    return f"{middle:>6} s ({low} to {high})"


def drop_pages(path: Path, data: Tensor) -> None:
    """Remove the pages of a file from memory."""
    stablefield.pool._advise(data, mmap.MADV_DONTNEED)
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def measure_distances(pool: Pool) -> None:
    distances = NeighbourDistances(pool, device=DEVICE)
    for what, labels in {"among all": [NULL_LABEL], "within each class": range(pool.num_classes)}.items():
        taken = seconds(lambda labels=labels: [distances(label) for label in labels])
        print(f"  {what:<20} {taken:7.1f} s (0 if read from the cache)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", type=Path, help="CIFAR-10 as a store (stablefield data convert)")
    parser.add_argument("--fashion-mnist", type=Path, help="IDX file of Fashion-MNIST's images")
    parser.add_argument(
        "--only",
        default="neighbours,speed,step,error,size,search,reading",
        help="comma-separated parts to run; all by default (%(default)s)",
    )
    parser.add_argument("--batches", type=int, nargs="*", default=[64, 512], help="batch sizes of the speed (64 512)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the speed, in which each way runs once (5)")
    parser.add_argument("--quick", action="store_true", help="only small data, to see that the script runs")
    options = parser.parse_args()
    only = options.only.split(",")
    sizes = [10**3, 10**4] if options.quick else [10**3, 10**4, 10**5, 10**6]
    torch.set_num_threads(1)
    print(headline(__file__))
    print(f"load of this machine before: {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores\n")
    cifar = on_device(Store(options.cifar10).load()) if options.cifar10 else None
    if cifar is not None:
        exact = ExactTarget(cifar)  # as in a run, which would take too long to measure distances between neighbours
        if "neighbours" in only:
            print(f"Distances to the 16 nearest of each, {cifar}")
            measure_distances(cifar)
        if "speed" in only:
            print(f"Seconds per batch, {cifar}")
            speed(cifar, options.batches, options.rounds)
        if "step" in only:
            print(f"\nBeside a training step, {cifar}")
            step(options.cifar10, cifar, exact)
        if "search" in only:
            print(f"\nNearest neighbours, {cifar}, 64 examples")
            search(cifar, exact)
        if "reading" in only:
            print("\nData on the disk")
            reading(cifar)
    if "error" in only:
        fashion = options.fashion_mnist and IDX(options.fashion_mnist).load()
        pools = {"digits": Digits().load(), "Fashion-MNIST": fashion, "CIFAR-10": cifar}
        for name, pool in pools.items():
            if pool is not None:
                print(f"\nAgainst the target that streams all data, {name}, {pool}")
                pool = on_device(Pool(pool.data, num_levels=pool.num_levels))
                error(pool, ExactTarget(pool, NeighbourDistances(pool, device=DEVICE)), 32)
    if "size" in only:
        print("\nAgainst the size of the data, 64 examples of EDM's noise, without distances between neighbours")
        print("          N       D    first batch       exact   all N streamed    ratio")
        repeats = {10**3: 20, 10**4: 20, 10**5: 8, 10**6: 3}
        for n in sizes:
            size(manifold(n, 256), repeats[n])
        for d in (64, 768) if options.quick else (64, 768, 3072, 12288):
            size(manifold(10_000, d), 8)
        if cifar is not None:
            print(f"  the same with {cifar}, tiled")
            for n in sizes:
                size(tiled(cifar, n), repeats[n])


if __name__ == "__main__":
    main()
