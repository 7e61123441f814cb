"""Time of scores and of writing samples, relative to the usual ways, and the difference of the results.

    python benchmarks/evaluate.py                       with OMP_NUM_THREADS=1: processor time, on busy machines too

Peers of the scores are torch-fidelity 0.4's functions if they can be imported (pip install torch-fidelity torchvision),
or else the same operations written anew: numpy's mean and covariance in float64; the kernel of KID in numpy with
float32 features; precision and recall by `torch.cdist`; the Frechet distance by the eigenvalues of C1 C2. That of
samples is `PIL.Image.fromarray(x).save(path)` in a loop, in folders of 1,000, with zlib's level 6 on both sides. Both
sides run in turns; a ratio above 1 means that ours is faster. Differences are relative to the result in float64.
"""

import argparse
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from common import clock_name, headline, interleaved, peak_of, processor_clock
from PIL import Image

from stablefield.evaluate import Statistics, StatisticsAccumulator, frechet_distance, kernel_distance, precision_recall
from stablefield.generate import SampleStore
from stablefield.pool import draw_without_replacement
from stablefield.sample import Samples
from stablefield.seeding import generator


def features(n: int, size: int, seed: int) -> torch.Tensor:
    """Non-negative correlated features, such as Inception's: many small ones and a few large ones."""
    source = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=torch.Generator().manual_seed(99)) / size**0.5
    scales = torch.logspace(0, -1.5, size)
    return ((torch.randn(n, size, generator=source) * scales) @ mixing + 0.1 * seed / size**0.5).relu() + 0.01


def peer_statistics(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    array = x.numpy().astype(np.float64)
    return np.mean(array, 0), np.cov(array, rowvar=False)


def peer_kid(x: torch.Tensor, y: torch.Tensor, subsets: int, size: int) -> float:
    draws, values = generator(0, "kernel distance"), []
    for _ in range(subsets):
        a, b = (z[draw_without_replacement(len(z), size, draws)].numpy() for z in (x, y))
        aa, bb, ab = (((p @ q.T) / p.shape[1] + 1) ** 3 for p, q in ((a, a), (b, b), (a, b)))
        within = (aa.sum() - np.trace(aa) + bb.sum() - np.trace(bb)) / (size * (size - 1))
        values.append(within - 2 * ab.mean())
    return float(np.mean(values))


def peer_precision_recall(samples: torch.Tensor, reference: torch.Tensor, k: int) -> tuple[float, float]:
    one, two = (torch.cdist(x, x).kthvalue(k + 1, 1).values for x in (samples, reference))
    cross = torch.cdist(samples, reference)
    return float((cross <= two).any(1).double().mean()), float((cross <= one[:, None]).any(0).double().mean())


def peer_frechet(first: Statistics, second: Statistics) -> float:
    values = np.linalg.eigvals(first.covariance.numpy() @ second.covariance.numpy())
    roots = np.sqrt(values.astype(np.complex128)).real.sum()
    traces = first.covariance.trace() + second.covariance.trace()
    return float((first.mean - second.mean).square().sum() + traces) - 2 * float(roots)


def fidelity() -> dict[str, Callable[..., object]]:
    """The peers of the scores: torch-fidelity's functions if they can be imported, or those above."""
    written = (peer_statistics, peer_kid, peer_precision_recall, peer_frechet)
    try:
        from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
        from torch_fidelity.metric_kid import kid_features_to_metric
        from torch_fidelity.metric_prc import prc_features_to_metric
    except ImportError as error:
        print(f"peers: the operations of torch-fidelity 0.4, written anew ({error})\n")
        return dict(zip(("statistics", "kid", "precision", "frechet"), written, strict=True))
    print(f"peers: the functions of torch-fidelity {version('torch-fidelity')}\n")

    def frechet(*both: Statistics) -> object:
        one, two = ({"mu": each.mean.numpy(), "sigma": each.covariance.numpy()} for each in both)
        return fid_statistics_to_metric(one, two, False)

    return {
        "statistics": fid_features_to_statistics,
        "kid": lambda x, y, subsets, size: kid_features_to_metric(
            x, y, kid_subsets=subsets, kid_subset_size=size, verbose=False
        ),
        "precision": lambda x, y, k: prc_features_to_metric(x, y, prc_neighborhood=k, verbose=False),
        "frechet": frechet,
    }


def peer_images(pixels: np.ndarray, folder: Path) -> None:
    for seed, image in enumerate(pixels):
        place = folder / f"{seed - seed % 1000:06d}"
        place.mkdir(exist_ok=True)
        Image.fromarray(image).save(place / f"{seed:06d}.png")


def write_store(x: torch.Tensor, folder: Path, batch: int = 64) -> None:
    store = SampleStore.open(folder / "samples", True, {})
    for start in range(0, len(x), batch):
        seeds = range(start, min(start + batch, len(x)))
        store.add(seeds, Samples(x[start : start + batch], None, 35))


def report(name: str, ours: Callable[[], object], peer: Callable[[], object], rounds: int) -> None:
    times = interleaved({"ours": ours, "peer": peer}, rounds, clock=processor_clock())
    (mine, *mine_range), (other, *other_range) = times["ours"], times["peer"]
    spreads = ("{:.3f} to {:.3f}".format(*each) for each in (mine_range, other_range))
    ours_text, peer_text = (f"{t:7.3f} s ({spread})" for t, spread in zip((mine, other), spreads, strict=True))
    print(f"{name:40} ours {ours_text}   peer {peer_text}   ratio {other / mine:5.2f}", flush=True)


def accuracy(name: str, found: float, exact: float) -> None:
    print(f"    {name} {found:.9g}, float64 {exact:.9g}, relative difference {abs(found / exact - 1):.1e}", flush=True)


def scores(options: argparse.Namespace) -> None:
    size, rounds, peers = options.features, options.rounds, fidelity()
    x, y = (features(max(options.n, options.pairs), size, seed) for seed in (1, 2))
    if "statistics" in options.only:
        z = x[: options.n]
        ours, peer = lambda: StatisticsAccumulator.from_features(z), lambda: peers["statistics"](z)
        report(f"statistics {options.n:,} x {size:,}", ours, peer, rounds)
    if "kid" in options.only:
        ours, peer = lambda: kernel_distance(x, y, subsets=10), lambda: peers["kid"](x, y, 10, 1000)
        report("KID, 10 subsets of 1,000", ours, peer, rounds)
        for more in (0.0, 1.0):  # sets that are alike, and sets that are not
            other = y * (1 + more)
            exact = peer_kid(x.double(), other.double(), 10, 1000)
            accuracy("KID", kernel_distance(x, other, subsets=10)[0], exact)
    if "precision" in options.only:
        a, b = x[: options.pairs], y[: options.pairs]
        ours, peer = lambda: precision_recall(a, b), lambda: peers["precision"](a, b, 3)
        report(f"precision and recall {options.pairs:,} x {size:,}", ours, peer, rounds)
        if options.float64:
            print(f"    {ours()}, peer in float64 {peer_precision_recall(a.double(), b.double(), 3)}")
        print(f"    memory beyond the features {peak_of(ours):,.0f} MB, peer {peak_of(peer):,.0f} MB")
    if "frechet" in options.only:
        one, two = (Statistics.from_features(z[: options.n]) for z in (x, y))
        ours, peer = lambda: frechet_distance(one, two), lambda: peers["frechet"](one, two)
        report(f"Frechet distance, F = {size:,}", ours, peer, rounds)
        exact = float((one.mean - two.mean).square().sum() + one.covariance.trace() + two.covariance.trace())
        exact -= 2 * float(torch.linalg.svdvals(one.root.T @ two.root).sum())
        accuracy("Frechet distance by singular values:", ours(), exact)


def images(options: argparse.Namespace) -> None:
    smooth = torch.nn.functional.interpolate(torch.randn(options.images, 3, 8, 8), (options.side, options.side))
    x = (0.4 * smooth + 0.05 * torch.randn_like(smooth)).clamp(-1, 1)
    pixels = np.ascontiguousarray((x * 127.5 + 128).clamp(0, 255).byte().movedim(1, -1).numpy())

    def within(write: Callable[[Path], None]) -> Callable[[], None]:
        def work() -> None:
            with tempfile.TemporaryDirectory() as folder:
                write(Path(folder))

        return work

    ours, peer = within(lambda folder: write_store(x, folder)), within(lambda folder: peer_images(pixels, folder))
    report(f"writing {options.images:,} PNGs of {options.side} x {options.side}", ours, peer, options.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--n", type=int, default=12_000, help="features of the statistics")
    parser.add_argument("--pairs", type=int, default=10_000, help="features of precision and recall")
    parser.add_argument("--float64", action="store_true", help="compare precision and recall with float64 (slow)")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--side", type=int, default=32)
    parts = ["statistics", "kid", "precision", "frechet", "images"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, metavar="PART", help=", ".join(parts))
    options = parser.parse_args()
    print(
        headline(__file__), f"seeds 1 and 2; {clock_name()}: median (min to max) of {options.rounds} rounds\n", sep=""
    )
    if set(options.only) - {"images"}:
        scores(options)
    if "images" in options.only:
        images(options)


if __name__ == "__main__":
    main()
