"""Memory and time of everything that compares all pairs, for several numbers of data points.

    python benchmarks/pairs.py                         six minutes on two cores
    python benchmarks/pairs.py --sizes 10000           half a minute

Each part runs once, in a process of its own and after a small one that loads the libraries. Memory is what it takes at
most beyond its inputs, which are features of 2,048 numbers or images of 3 x 32 x 32 bytes. The distances between all
pairs of 50,000 would take 10 GB in float32.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from common import headline, peak_of, printed

from stablefield import VE, KNNTarget, Pool
from stablefield.evaluate import find_nearest, kernel_distance, precision_recall
from stablefield.targets.isolation import nearest_distances

FEATURES = 2048


def features(n: int, seed: int) -> torch.Tensor:
    """Non-negative features with a mean, such as Inception's."""
    return torch.randn(n, FEATURES, generator=torch.Generator().manual_seed(seed)).relu_()


def images(n: int) -> Pool:
    """Random images of bytes."""
    return Pool(torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))


def pairs_of_features(score: Callable[[torch.Tensor, torch.Tensor], object], n: int) -> Callable[[], object]:
    """A score of two sets of n features."""
    x, y = features(n, 1), features(n, 2)
    return lambda: score(x, y)


def memorisation(n: int) -> Callable[[], object]:
    """The two nearest of n images for at most 1,000 samples."""
    pool = images(n)
    samples = pool.take(torch.arange(min(n, 1000))) + 0.1
    return lambda: find_nearest(samples, pool)


def nearest_of_noisy(n: int) -> Callable[[], object]:
    """The nearest of n images to 64 noisy ones, and the targets from them."""
    pool, index = images(n), torch.arange(64)
    x = pool.take(index)
    noisy, target = VE().perturb(x, torch.full((64,), 5.0), torch.randn_like(x), index=index), KNNTarget(pool, 256)
    return lambda: target(noisy)


PARTS: dict[str, Callable[[int], Callable[[], object]]] = {
    "precision and recall": partial(pairs_of_features, precision_recall),
    "KID, 10 subsets of 1,000": partial(pairs_of_features, partial(kernel_distance, subsets=10)),
    "memorisation, 1,000 samples": memorisation,
    "256 nearest of 64 noisy images": nearest_of_noisy,
    "distances for exact targets": lambda n: partial(nearest_distances, images(n)),
}


def measure(name: str, n: int) -> None:
    """Print seconds and megabytes of one part."""
    PARTS[name](300)()
    work, seconds = PARTS[name](n), list[float]()

    def timed() -> None:
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)

    megabytes = peak_of(timed)
    print(f"{seconds[0]:.2f} {megabytes:.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 50_000], help="numbers of data points")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        sys.exit(measure(options.measure[0], int(options.measure[1])))
    if min(options.sizes) < 256:
        parser.error(f"sizes must be at least 256, the number of neighbours, not {min(options.sizes)}")
    print(headline(__file__))
    print(f"  {'':32} {'data points':>11} {'seconds':>9} {'extra MB':>9}")
    for name in PARTS:
        for n in options.sizes:
            seconds, megabytes = printed(__file__, "--measure", name, str(n))
            print(f"  {name:32} {n:11,} {seconds:9.2f} {megabytes:9.0f}", flush=True)
