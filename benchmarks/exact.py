"""What the exact target costs when nothing is computed that nobody could see, and how far it is from the full one.

    python benchmarks/exact.py --cifar10 STORE --fashion-mnist FILE --only speed,step,error,size

and also search, neighbours, reading. STORE is what `stablefield data convert` makes of CIFAR-10; without it (and
without FILE, an IDX of Fashion-MNIST's images) those parts are left out; `reading` writes 1.5 GB to the folder for
temporary files. On a GPU, if there is one, with the data on it; elsewhere seconds are processor time on one thread, so
that others on the machine disturb less. Ratios within this run are what counts.
"""

import argparse
import itertools
import math
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import headline
from torch import Tensor

from stablefield import (
    VE,
    FullDataset,
    LogNormal,
    LogUniform,
    NearestNeighbours,
    Perturbed,
    Pool,
    Posterior,
    PrunedDataset,
    ReferenceBatch,
    SingleSample,
    TargetEstimator,
    Times,
    ahead,
)
from stablefield.config import override, resolve
from stablefield.data import IDX, Digits, FoundNeighbours, NeighbourDistances, Store
from stablefield.data.mapping import as_tensor, mapped
from stablefield.engine import TrainState, train
from stablefield.process import per_row
from stablefield.ranks import Ranks
from stablefield.recipes import read_recipe
from stablefield.reference import ALL
from stablefield.run import assemble
from stablefield.seeding import generator

NOISES: dict[str, Times] = {"EDM, exp(N(-1.2, 1.2))": LogNormal(-1.2, 1.2), "VE, 0.01 to 50": LogUniform(0.01, 50)}
LEVELS = (0.002, 0.02, 0.1, 0.3, 0.5, 0.7, 1, 1.4, 2, 2.8, 4, 5.6, 8, 16, 32, 80)


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(work: Callable[[], object]) -> float:
    """Of one call: processor time, or on a GPU until it has finished."""
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
    """The data where the rows are."""
    return pool if DEVICE.type == "cpu" else pool.to(DEVICE)


def batch(pool: Pool, t: Tensor, seed: int = 0) -> Perturbed:
    """Members of a pool under noise."""
    g = generator(seed, "batch", len(t))
    index = torch.randint(len(pool), (len(t),), generator=g)
    x = pool.take(index).to(DEVICE)
    return VE().perturb(x, t.to(x), torch.randn(x.shape, generator=g).to(DEVICE), index=index)


def written_out(noisy: Perturbed, support: Tensor) -> Tensor:
    """The posterior mean over a reference batch from all differences at once, in float32."""
    difference = (noisy.x_t[:, None] - support).flatten(2)
    weight = torch.softmax(-difference.square().sum(2) / (2 * noisy.sigma[:, None] ** 2), 1)
    return (weight[:, :, None] * support.flatten(1)).sum(1)


def groups(pool: Pool, pruned: PrunedDataset, times: Times, size: int, number: int = 4) -> list[list[Perturbed]]:
    """Batches of so many rows, by as many as a run asks for at once."""
    together = pruned.steps(size)
    seeds = torch.arange(number * together).split(together)
    return [[batch(pool, times.draw(size, generator(seed, "t")), seed) for seed in some.tolist()] for some in seeds]


def as_in_a_run(pruned: PrunedDataset, some: list[Perturbed]) -> float:
    """Seconds that a batch takes if all of these are answered at once."""
    return seconds(lambda: pruned.several(some, [None] * len(some))) / len(some)


def speed(pool: Pool, pruned: PrunedDataset) -> None:
    full, references = FullDataset(pool), pool.take(torch.arange(1024)).to(DEVICE)
    print(f"  products of pruned targets: {pruned.arithmetic(DEVICE)}; {pruned.at_once:,} rows at once in a run")
    print(
        "                                     written out                        pruned   times less than   pruned, in"
    )
    print("                                      n = 1,024   all N streamed    in a run     both of them   steps alone")
    for name, times in NOISES.items():
        for size in (64, 512):
            many = groups(pool, pruned, times, size)
            pruned(many[0][0])
            found, apart, plain, typed = list[float](), list[float](), list[float](), list[float]()
            for some in many:  # in turns, so that what slows the machine down slows all down
                found.append(as_in_a_run(pruned, some))
                apart += [seconds(lambda noisy=noisy: pruned(noisy)) for noisy in some[:4]]
                first, part = some[0], some[0].rows(slice(0, 64))
                plain.append(seconds(lambda first=first: full(first)))
                typed.append(size // 64 * seconds(lambda part=part: written_out(part, references)))
            mean, alone, whole, out = map(statistics.mean, (found, apart, plain, typed))
            print(
                f"  {name:23} B = {size:3}   {out:8.2f} s   {whole:12.2f} s   {mean:7.3f} s   "
                f"{out / mean:5.1f} and {whole / mean:5.1f}   {alone:9.3f} s",
                flush=True,
            )

    for rows in (1, 2, 4, 8):
        noisy = batch(pool, torch.full((rows,), 10.0))
        taken = statistics.median(seconds(lambda noisy=noisy: pruned(noisy)) for _ in range(9))
        print(f"  sigma = 10, where all members matter, {rows} rows: {1e3 * taken:.0f} ms", flush=True)
    screening(pool, pruned)


def screening(pool: Pool, pruned: PrunedDataset) -> None:
    """What the screen takes of it, and what its product would take in bfloat16."""
    some, *_ = groups(pool, pruned, NOISES["EDM, exp(N(-1.2, 1.2))"], 64, 1)
    noisy, known = Perturbed.joined(some), pruned.known(ALL, DEVICE)
    rows = (known.level_of(noisy.index).to(DEVICE) <= noisy.sigma).nonzero().flatten()
    asked, members = noisy.rows(rows), known.screen.seen
    seen = torch.nn.functional.pad(known.projection(asked.x_t), (0, 1))
    narrow = seen.bfloat16(), members.bfloat16()
    parts = {
        "screening": lambda: known.survivors(asked, pruned.shards, pruned.lost / 3),
        "its product": lambda: seen @ members.T,
        "the same in bfloat16": lambda: narrow[0] @ narrow[1].T,
    }
    taken = {name: min(seconds(work) for _ in range(9)) for name, work in parts.items()}
    whole = as_in_a_run(pruned, some) * len(some)
    said = ", ".join(f"{name} {1e3 * spent:.0f} ms" for name, spent in taken.items())
    print(f"  {len(noisy):,} rows of EDM's noise {1e3 * whole:.0f} ms, of which ({len(rows)} rows) {said}", flush=True)


def step(store: Path, pool: Pool, pruned: PrunedDataset, images: int = 16) -> None:
    """What pruned targets take beside a step of the full-width NCSN++."""
    settings = ["data.kind=store", f"data.path={store}", f"training.batch_size={images}", "target.kind=single"]
    parts = assemble(resolve(override(read_recipe("cifar10-ncsnpp-edm-stf"), settings)), ranks=Ranks(DEVICE))
    steps = train(TrainState(parts.denoiser), parts.objective, parts.batches, images=10**12, seed=0)
    seconds(lambda: next(steps))
    an_image = statistics.mean(seconds(lambda: next(steps)) for _ in range(2)) / images
    numbers = sum(p.numel() for p in parts.denoiser.parameters())
    print(f"  NCSN++ of {numbers / 1e6:.1f} M parameters, {images} images a step: {an_image:.3f} s an image")
    for name, times in NOISES.items():
        for size in (64, 512):
            many = groups(pool, pruned, times, size)
            found = statistics.mean(as_in_a_run(pruned, some) for some in many) / size
            share = f"{found / an_image:.2%} of that"
            print(f"  {name:23} B = {size:3}   {1e3 * found:.3f} ms an image, {share}", flush=True)


def error(pool: Pool, pruned: PrunedDataset, rows: int) -> None:
    full, known = FullDataset(pool), pruned.known(ALL, DEVICE)
    rms = float(pool.take(torch.arange(min(5000, len(pool)))).flatten(1).square().sum(1).mean().sqrt())
    print("    sigma      ESS   isolated   shared   largest error / rms   s   of all N, s")
    for sigma in LEVELS:
        noisy = batch(pool, torch.full((rows,), sigma), int(1000 * sigma))
        taken = [seconds(lambda target=target, noisy=noisy: target(noisy)) for target in (pruned, full)]
        found, exact = pruned(noisy), full(noisy)
        off = (found.mean - exact.mean).flatten(1).norm(dim=1).max() / rms
        isolated, shared = (100 * share.double().mean() for share in (known.level > sigma, found.ess > 1))
        print(
            f"  {sigma:7g} {exact.ess.mean():8.1f}   {isolated:6.1f} %   {shared:5.1f} %   {off:19.1e}   "
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
    """So many images: those of the pool, and then each moved sideways by one pixel more, round the edge."""
    copies = [pool.data.roll(shift, -1) for shift in range(-(-n // len(pool)))]
    return Pool(torch.cat(copies)[:n], levels=pool.levels)


def size(pool: Pool, repeats: int) -> None:
    pool = on_device(pool)
    noise = NOISES["EDM, exp(N(-1.2, 1.2))"]
    many = [batch(pool, noise.draw(64, generator(seed, "t")), seed) for seed in range(repeats)]
    pruned, full = PrunedDataset(pool), FullDataset(pool)
    ready = seconds(lambda: pruned(many[0]))
    found = statistics.mean(seconds(lambda noisy=noisy: pruned(noisy)) for noisy in many)
    whole = seconds(lambda: full(many[0]))
    print(
        f"  {len(pool):9,} {math.prod(pool.shape):7,}   {ready:7.2f} s   {1e3 * found:9.1f} ms   {1e3 * whole:10.1f} ms"
        f"   {whole / found:6.1f}",
        flush=True,
    )


def proposal(noisy: Perturbed, pool: Pool, nearest: Tensor, n: int, g: torch.Generator) -> Posterior:
    """Self-normalised importance sampling: n members drawn from a proposal that the k nearest decide.

    It gives each of the k nearest its weight, and all others the least of these; draws are corrected by weight over
    proposal. After Niedoba et al. 2024, as we understand it. Consistent for n to infinity, and biased at any n.
    """
    k = nearest.shape[1]
    support = pool.take(nearest.flatten()).unflatten(0, nearest.shape)
    log_w = -(noisy.x_t[:, None] - support).flatten(2).double().square().sum(2) / (2 * noisy.sigma[:, None] ** 2)
    log_q = torch.cat([log_w, log_w.amin(1, keepdim=True) + math.log(len(pool) - k)], 1)
    column = torch.multinomial(torch.softmax(log_q, 1), n, replacement=True, generator=g)
    other = torch.randint(len(pool), column.shape, generator=g)
    member = torch.where(column < k, nearest.gather(1, column.clamp(max=k - 1)), other)
    drawn = pool.take(member.flatten()).unflatten(0, member.shape)
    log_r = -(noisy.x_t[:, None] - drawn).flatten(2).double().square().sum(2) / (2 * noisy.sigma[:, None] ** 2)
    log_r -= torch.where(column < k, log_w.gather(1, column.clamp(max=k - 1)), log_w.amin(1, keepdim=True))
    r = torch.softmax(log_r, 1).float()
    mean = (per_row(r.flatten(), drawn.flatten(0, 1)).view(*r.shape, *[1] * len(pool.shape)) * drawn).sum(1)
    return Posterior(mean, 1 / r.square().sum(1), torch.zeros(len(mean)))


def search(pool: Pool, pruned: PrunedDataset) -> None:
    k, rows, g = 64, 64, generator(0, "proposal")
    found = {name: FoundNeighbours(pool, k, name, 8) for name in ("PCA64,Flat", "PCA64,IVF256,Flat")}
    targets: dict[str, TargetEstimator] = {
        "single sample": SingleSample(),
        "1,024 references": ReferenceBatch(pool, 1024),
        "64 nearest": NearestNeighbours(pool, k),
        **{f"64 by {name}": target for name, target in found.items()},
    }
    for sigma in (1.4, 2.0, 2.8, 4.0, 8.0):
        noisy = batch(pool, torch.full((rows,), sigma), int(100 * sigma))
        exact = pruned(noisy).mean
        nearest = NearestNeighbours(pool, k)._nearest(noisy, ALL)
        print(f"  sigma = {sigma}")
        for name, target in targets.items():
            spent = seconds(lambda target=target, noisy=noisy: target(noisy, generator=g))
            off = (target(noisy, generator=g).mean - exact).flatten(1).square().sum(1).mean()
            listed = target.found(noisy, ALL) if isinstance(target, FoundNeighbours) else None
            recall = "" if listed is None else f"   recall {_recall(listed, nearest):.2f}"
            print(f"    {name:24} mean squared distance to exact {off:8.2f}   {spent:6.2f} s{recall}", flush=True)
        off = (proposal(noisy, pool, nearest, 256, g).mean - exact).flatten(1).square().sum(1).mean()
        print(f"    {'proposal from 64 nearest':24} mean squared distance to exact {off:8.2f}   (256 draws, biased)")


def _recall(listed: Tensor, nearest: Tensor) -> float:
    return float((listed[:, :, None] == nearest[:, None]).any(1).double().mean())


def reading(pool: Pool, copies: int = 10, repeats: int = 7) -> None:
    """Data mapped from a file whose pages are in memory or not: seconds by the clock.

    The copies are moved sideways, and taken to be as far from each other as the images are.
    """
    noisy, told = batch(pool, torch.full((2,), 10.0)), ahead.soon
    systems = {"told beforehand": told, "not told": lambda part: None}
    taken: dict[tuple[str, bool], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.npy"
        np.save(path, tiled(pool, copies * len(pool)).data.cpu().numpy())
        data, distances = as_tensor(mapped(path)), NeighbourDistances(pool, device=DEVICE)
        pruned = PrunedDataset(Pool(data, levels=pool.levels), lambda label: distances(label).repeat(copies, 1))
        pruned(noisy)
        for _, (name, soon), cold in itertools.product(range(repeats), systems.items(), (False, True)):
            ahead.soon = soon
            taken.setdefault((name, cold), []).append(by_the_clock(path, data, cold, lambda: pruned(noisy)))
        ahead.soon = told
        print(f"  {len(data):,} members, {data.nbytes / 1e9:.1f} GB          in memory              on the disk")
        print("  two rows for which all pass")
        for name in systems:
            print(f"    {name:26}", *(spread(taken[name, cold]) for cold in (False, True)), flush=True)
        some, *_ = groups(Pool(pool.data, levels=pool.levels), pruned, NOISES["EDM, exp(N(-1.2, 1.2))"], 64, 1)
        ways: dict[str, list[Callable[[], object]]] = {
            "one after the other": [partial(pruned, noisy) for noisy in some],
            "at once, as in a run": [lambda: pruned.several(some, [None] * len(some))],
        }
        print(f"  {len(some)} steps of 64 rows of EDM's noise, seconds a step")
        for name, calls in ways.items():
            for _, cold in itertools.product(range(3), (False, True)):
                spent = sum(by_the_clock(path, data, cold, call) for call in calls)
                taken.setdefault((name, cold), []).append(spent / len(some))
            print(f"    {name:26}", *(spread(taken[name, cold]) for cold in (False, True)), flush=True)


def by_the_clock(path: Path, data: Tensor, cold: bool, work: Callable[[], object]) -> float:
    """Seconds of one call that reads from a file, with none of its pages in memory if it shall be cold."""
    if cold:
        forget(path, data)
    start = time.perf_counter()
    work()
    if DEVICE.type != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def spread(times: list[float]) -> str:
    """The median, the least and the most."""
    return f"{statistics.median(times):6.2f} s ({min(times):.2f} to {max(times):.2f})"


def forget(path: Path, data: Tensor) -> None:
    """Let a file's pages be in nobody's memory."""
    ahead.advise(data, mmap.MADV_DONTNEED)
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def measure_distances(pool: Pool) -> None:
    distances = NeighbourDistances(pool, device=DEVICE)
    for what, labels in {"among all": [ALL], "within each class": range(pool.classes)}.items():
        taken = seconds(lambda labels=labels: [distances(label) for label in labels])
        print(f"  {what:<20} {taken:7.1f} s (0 where they were in the cache)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", type=Path)
    parser.add_argument("--fashion-mnist", type=Path)
    parser.add_argument("--only", default="neighbours,speed,step,error,size,search,reading")
    options = parser.parse_args()
    only = options.only.split(",")
    torch.set_num_threads(1)
    print(headline(__file__))
    print(f"load of this machine before: {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores\n")
    cifar = on_device(Store(options.cifar10).load()) if options.cifar10 else None
    if cifar is not None:
        pruned = PrunedDataset(cifar, NeighbourDistances(cifar, device=DEVICE))
        if "neighbours" in only:
            print(f"Distances to the 16 nearest of each, {cifar}")
            measure_distances(cifar)
        if "speed" in only:
            print(f"Seconds a batch, {cifar}")
            speed(cifar, pruned)
        if "step" in only:
            print(f"\nBeside a training step, {cifar}")
            step(options.cifar10, cifar, pruned)
        if "search" in only:
            print(f"\nThe nearest neighbours, {cifar}, 64 rows")
            search(cifar, pruned)
        if "reading" in only:
            print("\nBytes on the disk")
            reading(cifar)
    if "error" in only:
        fashion = options.fashion_mnist and IDX(options.fashion_mnist).load()
        pools = {"digits": Digits().load(), "Fashion-MNIST": fashion, "CIFAR-10": cifar}
        for name, pool in pools.items():
            if pool is not None:
                print(f"\nAgainst the full data set, {name}, {pool}")
                pool = on_device(Pool(pool.data, levels=pool.levels))
                error(pool, PrunedDataset(pool, NeighbourDistances(pool, device=DEVICE)), 32)
    if "size" in only:
        print("\nAgainst the size of the data, 64 rows of EDM's noise, without distances between neighbours")
        print("          N       D      ready        pruned   all N streamed    ratio")
        for n, d, repeats in [(10**3, 256, 20), (10**4, 256, 20), (10**5, 256, 8), (10**6, 256, 3)]:
            size(manifold(n, d), repeats)
        for d in (64, 768, 3072, 12288):
            size(manifold(10_000, d), 8)
        if cifar is not None:
            print(f"  the same with {cifar}, tiled")
            for n, repeats in [(10**3, 20), (10**4, 20), (10**5, 8), (10**6, 3)]:
                size(tiled(cifar, n), repeats)


if __name__ == "__main__":
    main()
