"""Targets under EDM's augmentation: their cost beside a training step, and the bias of the published estimator.

    python benchmarks/augmented.py --data cifar10-32x32.zip      about ten minutes on two cores
    python benchmarks/augmented.py                               a smaller case on synthetic images, about a minute

Cost: processor seconds of the target of one batch of `cifar10-ncsnpp-edm-stf` for several `target.augmented_size` (the
reference batch of examples whose map does not permute pixels), and of `stf-published`, beside forward and backward of
the network at full width.

Bias: at noisy images x_t with a map A, the mean of `stf-published` over sources and reference batches minus
E[A x | x_t, A], for a subset of the images as the data set. The mean over sources is exact; the square of the bias is
estimated without bias, from products of different reference batches. All figures are squares relative to the variance
of DSM's target, E Tr Cov[A x | x_t, A], at the same x_t: bias^2, and the mean squared error around E[A x | x_t, A] of
`stf-published` and of `stf` with 64 references seen through the map.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from common import headline
from torch import Tensor
from training import synthetic

from stablefield.augmentation import flip, permutes, warp_all
from stablefield.build import build
from stablefield.config import override, resolve
from stablefield.data import EDMAugmentation, write_zip
from stablefield.data.contents import Contents
from stablefield.engine import TrainState
from stablefield.engine.loop import perturb
from stablefield.pool import Pool
from stablefield.recipes import read_recipe
from stablefield.seeding import generator

SEED = 0
SIGMAS = (4.0, 8.0, 16.0, 32.0)


def cost(data: Path, batch: int, sizes: list[int]) -> None:
    """Print processor seconds of the targets of one batch, and of the network."""
    given = [f"data.path={data}", f"training.batch_size={batch}", f"training.seed={SEED}"]
    kinds = {f"stf, augmented_size {n}": [f"target.augmented_size={n}"] for n in sizes}
    kinds["stf-published"] = ["target.kind=stf-published"]
    for name, settings in kinds.items():
        parts = build(resolve(override(read_recipe("cifar10-ncsnpp-edm-stf"), [*given, *settings])))
        noisy = perturb(TrainState(parts.denoiser), parts.objective, parts.batches, 0, SEED)
        parts.objective.target(noisy, generator=generator(SEED))
        start = time.process_time()
        target = parts.objective.target(noisy, generator=generator(SEED))
        print(f"  {name:24} {time.process_time() - start:8.2f} s", flush=True)
    start = time.process_time()
    parts.objective.loss(parts.denoiser, parts.denoiser.process, noisy, target).loss.backward()
    print(f"  {'forward and backward':24} {time.process_time() - start:8.2f} s")


def bias(pool: Pool, size: int, draws: int, examples: int, mapped_size: int = 64) -> None:
    """Print the bias and the errors by noise level, for maps that permute pixels and for others."""
    x, n = pool.take(torch.arange(len(pool))), len(pool)
    augmentation = EDMAugmentation()
    references = []
    for draw in range(draws):
        index = torch.randperm(n, generator=generator(SEED, "draw", draw))[: size - 1]
        generators = [generator(SEED, "references", draw, int(k)) for k in index]
        references.append(augmentation(x[index], generators)[0].flatten(1).double())
    _, labels, maps = augmentation(x[:1].expand(400, -1, -1, -1), [generator(SEED, "maps", k) for k in range(400)])
    for name, chosen in {"flips and the identity": permutes(labels), "other maps": ~permutes(labels)}.items():
        sums = torch.zeros(len(SIGMAS), 4, dtype=torch.float64)
        for example in chosen.nonzero().flatten()[:examples].tolist():
            flipped = flip(x, labels[example].expand(n, -1))
            seen = flipped if permutes(labels[example][None]) else warp_all(flipped, maps[example][None])[0]
            seen, g = seen.flatten(1).double(), generator(SEED, "example", example)
            source = seen[int(torch.randint(n, (), generator=g))]
            noise = torch.randn(source.shape, generator=g, dtype=torch.float64)
            for row, sigma in enumerate(SIGMAS):
                sums[row] += errors(source + sigma * noise, sigma, seen, references, mapped_size)
        print(f"  {name}: sigma, bias^2, error of stf-published, error of stf with {mapped_size}")
        for sigma, (dsm, square, published, mapped) in zip(SIGMAS, sums.tolist(), strict=True):
            dsm = max(dsm, 1e-12)
            print(f"    {sigma:5} {square / dsm:10.4f} {published / dsm:10.4f} {mapped / dsm:10.4f}", flush=True)


def errors(x_t: Tensor, sigma: float, seen: Tensor, references: list[Tensor], mapped_size: int) -> Tensor:
    """DSM's variance, the squared bias of the published estimator, and the mean squared errors of both, at one x_t."""
    energy = (seen - x_t).square().sum(1) / (2 * sigma**2)
    own = (energy.min() - energy).exp()  # weight of each data point under the map of the example
    p = own / own.sum()
    mean = p @ seen
    dsm = p @ (seen - mean).square().sum(1)
    found, published, mapped = [], 0.0, 0.0
    for draw, drawn in enumerate(references):
        w = (energy.min() - (drawn - x_t).square().sum(1) / (2 * sigma**2)).clamp(max=700).exp()
        targets = (w @ drawn + own[:, None] * seen) / (w.sum() + own)[:, None]  # one for each possible source
        found.append(p @ targets - mean)
        published += float(p @ (targets - mean).square().sum(1)) / len(references)
        shared = torch.randperm(len(seen), generator=generator(SEED, "mapped", draw))[: mapped_size - 1]
        joins = torch.ones(len(seen), dtype=own.dtype).index_fill(0, shared, 0) * own
        total = own[shared].sum() + joins
        targets = (own[shared] @ seen[shared] + joins[:, None] * seen) / total[:, None].clamp(min=1e-300)
        mapped += float(p @ (targets - mean).square().sum(1)) / len(references)
    error = torch.stack(found)
    square = (error.sum(0).square().sum() - error.square().sum()) / (len(error) * (len(error) - 1))
    return torch.stack([dsm, square, torch.tensor(published), torch.tensor(mapped)]).double()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="CIFAR-10 as a ZIP file in EDM's layout; synthetic images by default")
    parser.add_argument("--batch", type=int, help="examples whose targets are timed (16; 4 of synthetic images)")
    parser.add_argument("--sizes", type=int, nargs="*", default=[1, 16, 64], help="reference batches that are timed")
    parser.add_argument("--images", type=int, help="images of the data set for the bias (1000; 250 synthetic images)")
    parser.add_argument("--references", type=int, help="size of the published estimator there (512; 128)")
    parser.add_argument("--draws", type=int, default=16, help="reference batches for each x_t (16)")
    parser.add_argument("--examples", type=int, default=12, help="x_t for each noise level and kind of map (12)")
    options = parser.parse_args()
    torch.manual_seed(SEED)
    print(headline(__file__))
    small = options.data is None
    batch = options.batch or (4 if small else 16)
    images, references = options.images or (250 if small else 1000), options.references or (128 if small else 512)
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or Path(folder) / "synthetic.zip"
        if small:
            print("2,000 synthetic images, and not photographs\n")
            write_zip(data, Contents.from_pool(synthetic(2000)))
        if options.sizes:
            print(f"cost of a batch of {batch}:")
            cost(data, batch, options.sizes)
        print(f"bias with {references} references out of {images} images:")
        whole = resolve({"data": {"kind": "images", "path": str(data)}}).make("data").load()
        chosen = torch.randperm(len(whole), generator=generator(SEED, "images"))[:images]
        bias(whole.subset(chosen), references, options.draws, options.examples)
