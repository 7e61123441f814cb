"""Where the time of a training step goes, what the package costs over a bare loop, and what decoding once saves.

    python benchmarks/training.py               on the CPU, or a GPU where there is one; some five minutes
    python benchmarks/training.py --batch 64    larger steps (on a CPU: many minutes)
    python benchmarks/training.py --data ZIP    real images, instead of made-up ones, for the decoding

The step is that of the recipe `cifar10-ncsnpp-edm-stf`: NCSN++ at full width, 1,024 references out of 50,000 images of
3 x 32 x 32 bytes in a store, in a smaller batch. What a part of it takes is timed alone and set against the whole step,
both taking turns with all else. The bare loop is denoising score matching as one would type it, on the same network:
no references, no augmentation, nothing kept or counted. Ratios within this run are what counts.
"""

import argparse
import copy
import io
import os
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import headline, interleaved
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate

from stablefield import FullDataset, Perturbed, Pool
from stablefield.config import override, resolve
from stablefield.data import Shuffled, Store, write, write_zip
from stablefield.data.contents import Contents
from stablefield.engine import TrainState, train
from stablefield.engine.train import perturb
from stablefield.recipes import read_recipe
from stablefield.run import Parts, assemble
from stablefield.seeding import generator

RECIPE, SIZE, SEED = "cifar10-ncsnpp-edm-stf", 50_000, 0
Timing = tuple[float, float, float]  # median and quartiles


def made_up(n: int) -> Pool:
    """Smooth images with a little noise: about as long as photographs once they are PNG."""
    draw = torch.Generator().manual_seed(SEED)
    smooth = interpolate(torch.rand(n, 3, 6, 6, generator=draw), (32, 32), mode="bicubic", antialias=True)
    noisy = 255 * smooth + 6 * torch.randn(n, 3, 32, 32, generator=draw)
    return Pool(noisy.clamp(0, 255).to(torch.uint8))


def parts_of(store: Path, *settings: str) -> Parts:
    """The recipe's, with some of it changed."""
    data = ["data.kind=store", f"data.path={store}", f"training.seed={SEED}"]
    return assemble(resolve(override(read_recipe(RECIPE), [*data, *settings])))


def whole_step(parts: Parts) -> Callable[[], object]:
    """A step of `train`, as the package does it."""
    state = TrainState(parts.denoiser)
    steps = train(state, parts.objective, parts.batches, images=10**12, seed=SEED)
    return lambda: next(steps)


def pieces(parts: Parts) -> dict[str, Callable[[], object]]:
    """What is done in a step beside the network, each alone, on another batch every time."""
    state, size, device = TrainState(parts.denoiser), parts.batches.size, next(parts.denoiser.parameters()).device
    seen = iter(range(0, 10**12, size))

    def noisy() -> Perturbed:
        return perturb(state, parts.objective.times, parts.batches, next(seen), SEED)

    known, everything = noisy(), FullDataset(parts.objective.target.pool)
    return {
        "loading": lambda: parts.batches(next(seen)).to(device),
        "loading and noise": noisy,
        "target": lambda: parts.objective.target(known, generator=generator(SEED, "references", next(seen))),
        "target of all 50,000": lambda: everything(known),
    }


def bare_step(network: nn.Module, data: Tensor, batch: int) -> Callable[[], object]:
    """A step of denoising score matching in EDM's form, as one would type it."""
    device = next(network.parameters()).device
    average = copy.deepcopy(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    weights, averaged = list(network.parameters()), list(average.parameters())
    network.train()

    def step() -> Tensor:
        x = data[torch.randint(len(data), (batch,), device=data.device)].to(device).float() / 127.5 - 1
        sigma = (1.2 * torch.randn(batch, 1, 1, 1, device=device) - 1.2).exp()
        variance = sigma**2 + 0.25
        x_t = x + sigma * torch.randn_like(x)
        answer = network(x_t / variance.sqrt(), sigma.flatten().log() / 4)
        answer = 0.25 / variance * x_t + 0.5 * sigma / variance.sqrt() * answer
        loss = (variance / (0.5 * sigma) ** 2 * (answer - x) ** 2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averaged, weights, 1e-3)
        return loss

    return step


def ratio(part: Timing, whole: Timing) -> Timing:
    """Of medians, and how far it may be off: a low part over a high whole, and the other way round."""
    return part[0] / whole[0], part[1] / whole[2], part[2] / whole[1]


def shares(store: Path, batch: int, repeats: int) -> None:
    parts = parts_of(store, f"training.batch_size={batch}")
    numbers = sum(p.numel() for p in parts.denoiser.parameters())
    print(f"Shares of a step: NCSN++ of {numbers / 1e6:.1f} M parameters, {batch} images, 1,024 references of 50,000")
    found = interleaved({"whole step": whole_step(parts), **pieces(parts)}, repeats)
    step = found["whole step"]
    for name, timing in found.items():
        middle, low, high = (100 * value for value in ratio(timing, step))
        print(f"  {name:22} {1000 * timing[0]:10.2f} ms   {middle:7.3f} %   ({low:.3f} to {high:.3f})", flush=True)


def against_a_bare_loop(store: Path, width: int, batch: int, repeats: int, targets: list[str]) -> None:
    settings = [f"training.batch_size={batch}", f"network.model_channels={width}", "augmentation.kind=none"]
    bare = parts_of(store, *settings)
    steps = {f"ours, target {kind}": whole_step(parts_of(store, *settings, *KINDS[kind])) for kind in targets}
    found = interleaved({**steps, BARE: bare_step(bare.denoiser.network, bare.pool.data, batch)}, repeats)
    print(f"\nImages a second, NCSN++ of width {width}, {batch} at a time (ratio to the bare loop)")
    for name, timing in found.items():
        middle, low, high = ratio(found[BARE], timing)
        print(f"  {name:26} {batch / timing[0]:9.2f}   x {middle:.3f}   ({low:.3f} to {high:.3f})", flush=True)


KINDS: dict[str, list[str]] = {"reference": [], "single": ["target.kind=single"]}
BARE = "bare loop, single samples"


def decoded_each_epoch(path: Path, batch: int) -> Callable[[], Tensor]:
    """A batch of images read from a zip, decoded every time they are seen."""
    archive = zipfile.ZipFile(path)
    names = [name for name in archive.namelist() if name.endswith((".png", ".jpg"))]
    draw = np.random.default_rng(SEED)

    def load() -> Tensor:
        chosen = draw.choice(len(names), batch, replace=False)
        images = [np.asarray(Image.open(io.BytesIO(archive.read(names[i])))) for i in chosen]
        return torch.from_numpy(np.stack(images)).movedim(-1, 1).float() / 127.5 - 1

    return load


def decoding(folder: Path, given: Path | None, store: Path, batch: int, repeats: int) -> None:
    if given is None:
        write_zip(folder / "made-up.zip", Contents.of(made_up(5_000)))
    loads = {
        "decoded at every step": decoded_each_epoch(given or folder / "made-up.zip", batch),
        "decoded once, mapped": _next_of(Store(store).load(), batch),
    }
    found = interleaved(loads, repeats)
    print(f"\nLoading, images a second, {batch} at a time, from {given.name if given else 'PNG files in a zip'}")
    for name, timing in found.items():
        middle, low, high = ratio(found["decoded at every step"], timing)
        print(f"  {name:26} {batch / timing[0]:11,.0f}   x {middle:.1f}   ({low:.1f} to {high:.1f})", flush=True)


def _next_of(pool: Pool, batch: int) -> Callable[[], object]:
    batches, seen = Shuffled(pool, batch, SEED), iter(range(0, 10**12, batch))
    return lambda: batches(next(seen))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--batch", type=int, default=256 if on_gpu else 16, help="images a step")
    parser.add_argument("--repeats", type=int, default=20 if on_gpu else 4, help="rounds at full width")
    parser.add_argument("--narrow", type=int, default=32, help="width of the reduced network")
    parser.add_argument("--data", type=Path, help="a zip of images to decode")
    parser.add_argument("--quick", action="store_true", help="narrow networks alone, two rounds")
    options = parser.parse_args()
    start = time.perf_counter()
    print(headline(__file__) + f"seed {SEED}, load before: {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores\n")
    with tempfile.TemporaryDirectory() as scratch:
        store = Path(scratch) / "store"
        write(store, Contents.of(made_up(SIZE)), source="made up")
        if not options.quick:
            shares(store, options.batch, options.repeats)
            against_a_bare_loop(store, 128, options.batch, options.repeats, ["reference"])
        against_a_bare_loop(store, options.narrow, options.batch, 2 if options.quick else 3 * options.repeats, [*KINDS])
        decoding(Path(scratch), options.data, store, 64, 20)
    print(f"\n{time.perf_counter() - start:.0f} s; load after: {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores")
