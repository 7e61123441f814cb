"""Time of scores and of writing samples, relative to the usual ways, and the difference of the results.

    python benchmarks/evaluate.py --repeats 5

The peers are written anew as they are described: numpy's mean and covariance in float64; the kernel of KID in numpy
with float32 features; precision and recall by `torch.cdist`; the Frechet distance by the eigenvalues of C1 C2, as
torch-fidelity 0.4 has them; and `PIL.Image.fromarray(x).save(path)` in a loop, in folders of 1,000. Both sides run in
turns; a ratio above 1 means that ours is faster. PNG files are compressed at zlib's level 6 on both sides.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import headline, interleaved, peak_of
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


def report(name: str, ours: Callable[[], object], peer: Callable[[], object], repeats: int) -> None:
    times = interleaved({"ours": ours, "peer": peer}, repeats)
    mine, other = times["ours"][0], times["peer"][0]
    print(f"{name:<46} ours {mine:7.3f} s   peer {other:7.3f} s   ratio {other / mine:5.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--n", type=int, default=12_000, help="features of the statistics")
    parser.add_argument("--pairs", type=int, default=10_000, help="features of precision and recall")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--only", nargs="*", default=["statistics", "kid", "precision", "frechet", "images"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size, repeats = options.features, options.repeats
    print(headline(__file__), f"seeds 1 and 2, {repeats} rounds\n", sep="")
    x, y = (features(max(options.n, options.pairs), size, seed) for seed in (1, 2))
    if "statistics" in options.only:
        z = x[: options.n]

        def numpy_statistics() -> tuple[np.ndarray, np.ndarray]:
            array = z.numpy().astype(np.float64)
            return np.mean(array, 0), np.cov(array, rowvar=False)

        report(
            f"statistics {options.n:,} x {size:,}",
            lambda: StatisticsAccumulator.from_features(z),
            numpy_statistics,
            repeats,
        )
    if "kid" in options.only:
        report(
            "KID, 10 subsets of 1,000",
            lambda: kernel_distance(x, y, subsets=10),
            lambda: peer_kid(x, y, 10, 1000),
            repeats,
        )
        exact = peer_kid(x.double(), y.double(), 10, 1000)
        found = kernel_distance(x, y, subsets=10)[0]
        print(f"    {found:.9g}, float64 {exact:.9g}, relative difference {abs(found / exact - 1):.1e}")
    if "precision" in options.only:
        a, b = x[: options.pairs], y[: options.pairs]
        report(
            f"precision and recall {options.pairs:,} x {size:,}",
            lambda: precision_recall(a, b),
            lambda: peer_precision_recall(a, b, 3),
            repeats,
        )
        print(f"    {precision_recall(a, b)}, peer in float64 {peer_precision_recall(a.double(), b.double(), 3)}")
        ours, peer = peak_of(lambda: precision_recall(a, b)), peak_of(lambda: peer_precision_recall(a, b, 3))
        print(f"    memory beyond the features {ours:,.0f} MB, peer {peer:,.0f} MB")
    if "frechet" in options.only:
        one, two = (Statistics.from_features(z[: options.n]) for z in (x, y))
        report(
            f"Frechet distance, F = {size:,}",
            lambda: frechet_distance(one, two),
            lambda: peer_frechet(one, two),
            repeats,
        )
        exact = float((one.mean - two.mean).square().sum() + one.covariance.trace() + two.covariance.trace())
        exact -= 2 * float(torch.linalg.svdvals(one.root.T @ two.root).sum())
        found = frechet_distance(one, two)
        print(f"    {found:.9g}, by singular values {exact:.9g}, relative difference {abs(found / exact - 1):.1e}")
    if "images" in options.only:
        smooth = torch.nn.functional.interpolate(torch.randn(options.images, 3, 8, 8), (options.side, options.side))
        images = (0.4 * smooth + 0.05 * torch.randn_like(smooth)).clamp(-1, 1)
        pixels = np.ascontiguousarray((images * 127.5 + 128).clamp(0, 255).byte().movedim(1, -1).numpy())

        def within(write: Callable[[Path], None]) -> Callable[[], None]:
            def work() -> None:
                with tempfile.TemporaryDirectory() as folder:
                    write(Path(folder))

            return work

        report(
            f"writing {options.images:,} PNGs of {options.side} x {options.side}",
            within(lambda folder: write_store(images, folder)),
            within(lambda folder: peer_images(pixels, folder)),
            repeats,
        )


if __name__ == "__main__":
    main()
