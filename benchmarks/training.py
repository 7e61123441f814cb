"""Time of the parts of a training step, overhead of the package over a bare loop, and time saved by decoding once.

    python benchmarks/training.py               on the CPU, or a GPU where there is one; about five minutes
    python benchmarks/training.py --batch 64    larger batches (on a CPU: many minutes)
    python benchmarks/training.py --data ZIP    real images instead of synthetic ones for the decoding
    python benchmarks/training.py --digits      only the default run, on digits

The step is that of the recipe `cifar10-ncsnpp-edm-stf` with a smaller batch: NCSN++ at full width, 1,024 references
out of 50,000 images of 3 x 32 x 32 bytes in a store. Each part of it is timed alone and compared with the whole step,
in turns with all others. The bare loop is a minimal implementation of denoising score matching with the same network:
without references, augmentation, metrics or checkpoints. Compare ratios within one run.
"""

import argparse
import copy
import io
import os
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import clock_name, headline, interleaved, processor_clock
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate, one_hot

from stablefield import NoisyBatch, Pool
from stablefield.build import Components, build
from stablefield.config import override, resolve
from stablefield.data import ShuffledBatches, Store, write_store, write_zip
from stablefield.data.contents import Contents
from stablefield.engine import TrainState, train
from stablefield.engine.loop import perturb
from stablefield.engine.session import initial_state, training_steps
from stablefield.recipes import read_recipe
from stablefield.seeding import generator
from stablefield.targets import ExactTarget

RECIPE, SIZE, SEED = "cifar10-ncsnpp-edm-stf", 50_000, 0
Timing = tuple[float, float, float]  # median, minimum and maximum


def synthetic(n: int) -> Pool:
    """Smooth images with a little noise, whose PNG files are about as large as those of photographs."""
    draw = torch.Generator().manual_seed(SEED)
    smooth = interpolate(torch.rand(n, 3, 6, 6, generator=draw), (32, 32), mode="bicubic", antialias=True)
    noisy = 255 * smooth + 6 * torch.randn(n, 3, 32, 32, generator=draw)
    return Pool(noisy.clamp(0, 255).to(torch.uint8))


def components_of(store: Path, *settings: str) -> Components:
    """Components of the recipe with changed settings."""
    data = ["data.kind=store", f"data.path={store}", f"training.seed={SEED}"]
    return build(resolve(override(read_recipe(RECIPE), [*data, *settings])))


def whole_step(components: Components) -> Callable[[], object]:
    """Function that runs one step of `train`."""
    state = TrainState(components.denoiser)
    steps = train(state, components.objective, components.batches, images=10**12, seed=SEED)
    return lambda: next(steps)


def step_parts(components: Components) -> dict[str, Callable[[], object]]:
    """Parts of a training step besides the network, each timed alone on a new batch."""
    state, device = TrainState(components.denoiser), next(components.denoiser.parameters()).device
    images = iter(range(0, 10**12, components.batches.size))

    def noisy() -> NoisyBatch:
        return perturb(state, components.objective, components.batches, next(images), SEED)

    batch, exact = noisy(), ExactTarget(components.pool, missing_mass=0.0)
    return {
        "loading": lambda: components.batches(next(images)).to(device),
        "loading and noise": noisy,
        "target": lambda: components.objective.target(batch, generator=generator(SEED, "references", next(images))),
        "target of all 50,000": lambda: exact(batch),
    }


def bare_step(network: nn.Module, data: Tensor, batch: int, labels: Tensor | None = None) -> Callable[[], object]:
    """Function that runs one step of a minimal implementation of denoising score matching in EDM's form.

    Args:
        network: the network, with 10 classes if there are labels.
        data: bytes, which are decoded, or floats.
        batch: examples per step.
        labels: class of each data point.
    """
    device = next(network.parameters()).device
    average = copy.deepcopy(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    weights, averaged = list(network.parameters()), list(average.parameters())
    network.train()

    def step() -> Tensor:
        index = torch.randint(len(data), (batch,), device=data.device)
        x = data[index].to(device)
        x = x if x.is_floating_point() else x.float() / 127.5 - 1
        sigma = (1.2 * torch.randn(batch, 1, 1, 1, device=device) - 1.2).exp()
        variance = sigma**2 + 0.25
        x_t = x + sigma * torch.randn_like(x)
        classes = {} if labels is None else {"label_one_hot": one_hot(labels[index], 10).float()}
        output = network(x_t / variance.sqrt(), sigma.flatten().log() / 4, **classes)
        x0 = 0.25 / variance * x_t + 0.5 * sigma / variance.sqrt() * output
        loss = (variance / (0.5 * sigma) ** 2 * (x0 - x) ** 2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averaged, weights, 1e-3)
        return loss

    return step


def ratio(part: Timing, whole: Timing) -> Timing:
    """Ratio of medians and its range: lowest part over highest whole, and highest over lowest."""
    return part[0] / whole[0], part[1] / whole[2], part[2] / whole[1]


def shares(store: Path, batch: int, repeats: int) -> None:
    components = components_of(store, f"training.batch_size={batch}")
    parameters = sum(p.numel() for p in components.denoiser.parameters())
    print(f"Shares of a step: NCSN++, {parameters / 1e6:.1f} M parameters, {batch} images, 1,024 references of 50,000")
    times = interleaved({"whole step": whole_step(components), **step_parts(components)}, repeats)
    step = times["whole step"]
    for name, timing in times.items():
        middle, low, high = (100 * value for value in ratio(timing, step))
        print(f"  {name:22} {1000 * timing[0]:10.2f} ms   {middle:7.3f} %   ({low:.3f} to {high:.3f})", flush=True)


def against_a_bare_loop(store: Path, width: int, batch: int, repeats: int, targets: list[str]) -> None:
    settings = [f"training.batch_size={batch}", f"network.model_channels={width}", "augmentation.kind=none"]
    bare = components_of(store, *settings)
    steps = {f"stablefield, {kind}": whole_step(components_of(store, *settings, *TARGETS[kind])) for kind in targets}
    times = interleaved({**steps, BARE: bare_step(bare.denoiser.network, bare.pool.data, batch)}, repeats)
    print(f"\nImages per second, NCSN++ of width {width}, in batches of {batch} (ratio to the bare loop)")
    for name, timing in times.items():
        middle, low, high = ratio(times[BARE], timing)
        print(f"  {name:26} {batch / timing[0]:9.2f}   x {middle:.3f}   ({low:.3f} to {high:.3f})", flush=True)


def digits(rounds: int, steps: int = 16) -> None:
    """The default run, 64 of 1,797 digits of 8 x 8 in 10 classes, beside the bare loop with the same network.

    A round has as many steps as are prepared at once (`engine.loop`).
    """

    def run(*settings: str) -> Callable[[], object]:
        config = resolve(override({}, [f"training.seed={SEED}", *settings]))
        components = build(config)
        taken = training_steps(config, components, initial_state(config, components), images=10**12)
        return lambda: [next(taken) for _ in range(steps)]

    components = build(resolve({}))
    pool, network = components.pool, components.denoiser.network
    bare = bare_step(network, pool.take(torch.arange(len(pool))), 64, pool.labels)
    ways = {"stablefield, default target (stf)": run(), "stablefield, dsm": run("target.kind=dsm")}
    ways["bare loop, DSM"] = lambda: [bare() for _ in range(steps)]
    times = interleaved(ways, rounds, clock=processor_clock())
    print(f"\nSteps on digits, {clock_name()}, median (min to max) of {rounds} rounds of {steps} steps")
    for name, timing in times.items():
        middle, low, high = ratio(times["bare loop, DSM"], timing)
        print(
            f"  {name:34} {1000 * timing[0] / steps:7.2f} ms   x {middle:.3f}   ({low:.3f} to {high:.3f})", flush=True
        )


TARGETS: dict[str, list[str]] = {"stf": [], "dsm": ["target.kind=dsm"]}
BARE = "bare loop, DSM"


def decoded_each_epoch(path: Path, batch: int) -> Callable[[], Tensor]:
    """Function that reads and decodes a batch of images from a ZIP file."""
    archive = zipfile.ZipFile(path)
    names = [name for name in archive.namelist() if name.endswith((".png", ".jpg"))]
    draw = np.random.default_rng(SEED)

    def load() -> Tensor:
        chosen = draw.choice(len(names), batch, replace=False)
        images = [np.asarray(Image.open(io.BytesIO(archive.read(names[i])))) for i in chosen]
        return torch.from_numpy(np.stack(images)).movedim(-1, 1).float() / 127.5 - 1

    return load


def decoding(folder: Path, archive: Path | None, store: Path, batch: int, repeats: int) -> None:
    if archive is None:
        write_zip(folder / "synthetic.zip", Contents.from_pool(synthetic(5_000)))
    loads = {
        "decoded at every step": decoded_each_epoch(archive or folder / "synthetic.zip", batch),
        "decoded once, memory map": _next_of(Store(store).load(), batch),
    }
    times = interleaved(loads, repeats)
    origin = archive.name if archive else "PNG files in a ZIP file"
    print(f"\nLoading, images per second in batches of {batch}, from {origin}")
    for name, timing in times.items():
        middle, low, high = ratio(times["decoded at every step"], timing)
        print(f"  {name:26} {batch / timing[0]:11,.0f}   x {middle:.1f}   ({low:.1f} to {high:.1f})", flush=True)


def _next_of(pool: Pool, batch: int) -> Callable[[], object]:
    batches, images = ShuffledBatches(pool, batch, SEED), iter(range(0, 10**12, batch))
    return lambda: batches(next(images))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--batch", type=int, default=256 if on_gpu else 16, help="images per step")
    parser.add_argument("--repeats", type=int, default=20 if on_gpu else 4, help="rounds at full width")
    parser.add_argument("--narrow", type=int, default=32, help="width of the reduced network")
    parser.add_argument("--data", type=Path, help="a ZIP file of images to decode")
    parser.add_argument("--digits", action="store_true", help="only the default run on digits")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of the run on digits (15)")
    parser.add_argument("--quick", action="store_true", help="only the narrow network, two rounds")
    options = parser.parse_args()
    start = time.perf_counter()
    print(headline(__file__) + f"seed {SEED}, load before: {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores\n")
    digits(options.rounds)
    if options.digits:
        sys.exit()
    with tempfile.TemporaryDirectory() as scratch:
        store = Path(scratch) / "store"
        write_store(store, Contents.from_pool(synthetic(SIZE)), source="synthetic")
        if not options.quick:
            shares(store, options.batch, options.repeats)
            against_a_bare_loop(store, 128, options.batch, options.repeats, ["stf"])
        against_a_bare_loop(
            store, options.narrow, options.batch, 2 if options.quick else 3 * options.repeats, [*TARGETS]
        )
        decoding(Path(scratch), options.data, store, 64, 20)
    print(f"\n{time.perf_counter() - start:.0f} s; load after: {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores")
