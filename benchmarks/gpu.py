"""Speed, memory and waits on a GPU: recipes, targets, sampling, precisions and compilation, in ten minutes at most.

    python benchmarks/gpu.py                     on a machine with a CUDA GPU
    python benchmarks/gpu.py --parts sampling    only one part; see docs/gpu.md
    python benchmarks/gpu.py --self-check        tiny sizes, on any machine: does every part still run?

Each part runs within a share of the time. One that fails or is cut short is listed at the end, with the reason, and
the others go on. The core of the package is enough: parts that need more (recipes are read with pydantic) are listed
as not run where it is missing. `waits` are the moments at which the host waited for the GPU, counted by PyTorch.
"""

import argparse
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from common import headline
from torch import Tensor, nn
from torch.nn import functional as F

from stablefield import VE, Pool
from stablefield.denoise import Preconditioned
from stablefield.kernel.matmul import DigitsMatmul, FloatMatmul, accurate_matmul
from stablefield.networks import SongUNet, ddpmpp
from stablefield.objective import EDMWeight, Objective
from stablefield.precision import arithmetic, autocast
from stablefield.preconditioning import EDMPreconditioning
from stablefield.sample import Heun
from stablefield.targets import DSMTarget, ExactTarget, KNNTarget, STFTarget, TargetEstimator
from stablefield.times import LogNormal

PARTS = ("precision", "layout", "targets", "exact", "sampling", "recipes", "compile")


class OutOfTimeError(Exception):
    """Raised between two steps when the time of a part is over."""


@dataclass
class Bench:
    """Sizes, deadline and what could not be run."""

    device: torch.device
    small: bool
    deadline: float = math.inf
    missing: list[str] = field(default_factory=list)

    @property
    def side(self) -> int:
        return 8 if self.small else 32

    @property
    def batch(self) -> int:
        return 8 if self.small else 512

    @property
    def points(self) -> int:
        return 64 if self.small else 50_000

    def network(self) -> SongUNet:
        sizes = {"model_channels": 8, "num_blocks": 1, "channel_mult": (1, 2)} if self.small else {}
        network = ddpmpp((3, self.side, self.side), **sizes)
        layout = {"memory_format": torch.channels_last} if self.device.type == "cuda" else {}
        return network.to(self.device, **layout)

    def pool(self) -> Pool:
        draw = torch.Generator().manual_seed(0)
        shape = (self.points, 3, self.side, self.side)
        return Pool(torch.randint(256, shape, generator=draw, dtype=torch.uint8)).to(self.device)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def measure(self, name: str, step: Callable[[], object], images: int) -> float:
        """Print images per second, peak memory and waits of a step; seconds per step."""
        for _ in range(1 if self.small else 3):
            self._check()
            step()
        waits = self._waits(step)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.synchronize()
        start, steps = time.perf_counter(), 0
        while steps < (1 if self.small else 5) or (not self.small and steps < 50 and time.perf_counter() - start < 3):
            self._check()
            step()
            steps += 1
        self.synchronize()
        seconds = (time.perf_counter() - start) / steps
        memory = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else math.nan
        print(f"  {name:44} {images / seconds:10,.0f} images/s {memory:7.2f} GiB {waits:5} waits", flush=True)
        return seconds

    def _waits(self, step: Callable[[], object]) -> int:
        if self.device.type != "cuda":
            step()
            return 0
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(each.message) for each in found)

    def _check(self) -> None:
        if time.perf_counter() > self.deadline:
            raise OutOfTimeError


# ---- steps


def plain_step(bench: Bench, network: nn.Module, precision: str) -> Callable[[], object]:
    """A step of EDM written directly: log-normal noise, preconditioning, weighted loss, Adam; no package around it."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=True)
    data, batch, device = bench.pool().data, bench.batch, bench.device

    def step() -> None:
        x = data[torch.randint(len(data), (batch,), device=device)].float() / 127.5 - 1
        sigma = (1.2 * torch.randn(batch, device=device) - 1.2).exp()
        level = sigma[:, None, None, None]
        c_skip, scale = 0.25 / (level**2 + 0.25), (level**2 + 0.25).sqrt()
        x_t = x + level * torch.randn_like(x)
        with autocast(precision, device):
            output = network(x_t / scale, sigma.log() / 4)
        denoised = c_skip * x_t + 0.5 * level / scale * output.float()
        loss = ((level**2 + 0.25) / (0.5 * level) ** 2 * (denoised - x).square()).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def our_step(
    bench: Bench, network: nn.Module, target: Callable[[Pool], TargetEstimator], precision: str
) -> Callable[[], object]:
    """A step with the objective of this package."""
    pool, device = bench.pool(), bench.device
    denoiser = Preconditioned(network, VE(), EDMPreconditioning())
    objective = Objective(LogNormal(), target(pool), EDMWeight())
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=1e-4, fused=True)
    draw = torch.Generator().manual_seed(0)

    def step() -> None:
        index = torch.randint(len(pool), (bench.batch,), generator=draw)
        x = pool.take(index).to(device)
        with autocast(precision, device):
            loss = objective(denoiser, x, index=index, generator=draw).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


# ---- parts


def precision(bench: Bench) -> None:
    for name in ("float32", "tf32", "bfloat16", "float16"):
        with arithmetic(name):
            bench.measure(f"EDM-like step, {name}", plain_step(bench, bench.network(), name), bench.batch)


class NativeGroupNorm(nn.Module):
    """PyTorch's group normalisation with the parameters of another."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.groups, self.weight, self.bias, self.eps = norm.num_groups, norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.groups, self.weight, self.bias, self.eps)


def layout(bench: Bench) -> None:
    for name in ("float32", "bfloat16"):
        for form in ("as it is", "PyTorch's group norm", "and channels first"):
            network = bench.network()
            if form != "as it is":
                for module in list(network.modules()):
                    for child, norm in module.named_children():
                        if isinstance(norm, nn.GroupNorm):
                            setattr(module, child, NativeGroupNorm(norm))
            if form == "and channels first":
                network = network.to(memory_format=torch.contiguous_format)
            with arithmetic(name):
                bench.measure(f"{name}, {form}", plain_step(bench, network, name), bench.batch)


def targets(bench: Bench) -> None:
    kinds: dict[str, Callable[[Pool], TargetEstimator]] = {
        "DSM": lambda pool: DSMTarget(),
        "STF, 1024 references": lambda pool: STFTarget(pool, min(1024, len(pool))),
        "KNN": lambda pool: KNNTarget(pool, 16),
        "exact": ExactTarget,
    }
    with arithmetic("bfloat16"):
        plain = bench.measure("EDM-like step", plain_step(bench, bench.network(), "bfloat16"), bench.batch)
        for name, target in kinds.items():
            seconds = bench.measure(name, our_step(bench, bench.network(), target, "bfloat16"), bench.batch)
            print(f"  {'':44} {seconds / plain:10.2f} x the EDM-like step")


def exact(bench: Bench) -> None:
    pool, process = bench.pool(), VE()
    for name, target in (("searched", ExactTarget(pool)), ("streamed", ExactTarget(pool, missing_mass=0.0))):
        index = torch.arange(bench.batch) % len(pool)
        x = pool.take(index).to(bench.device)
        for sigma in (0.5, 5.0):
            t = torch.full((len(x),), sigma, device=bench.device)
            noisy = process.perturb(x, t, torch.randn_like(x), index=index)
            bench.measure(f"exact target, {name}, sigma {sigma:g}", lambda of=target, at=noisy: of(at), len(x))
    x, y = pool.take(index).flatten(1).double(), pool.take(torch.arange(min(4096, len(pool)))).flatten(1)
    used = type(accurate_matmul(x))
    for kind in (FloatMatmul, DigitsMatmul):
        way, mark = kind(x), " (used)" if kind is used else ""
        bench.measure(f"products with {len(y)} references, {kind.__name__}{mark}", partial(way.inner, y), len(x))


def sampling(bench: Bench) -> None:
    for name in ("float32", "tf32", "bfloat16"):
        denoiser = Preconditioned(bench.network(), VE(), EDMPreconditioning()).eval().requires_grad_(False)
        sampler, count = Heun(steps=2 if bench.small else 18), 8 if bench.small else 256

        def sample(of: nn.Module = denoiser, by: Heun = sampler, n: int = count) -> object:
            return by(of, (3, bench.side, bench.side), seeds=range(n))

        with arithmetic(name), autocast(name, bench.device):
            bench.measure(f"Heun, {2 * sampler.steps - 1} evaluations, {name}", sample, count)


def compiled(bench: Bench) -> None:
    for name in ("float32", "bfloat16"):
        with arithmetic(name):
            network = bench.network()
            eager = bench.measure(f"eager, {name}", plain_step(bench, network, name), bench.batch)
            network.compile(backend="eager" if bench.small else "inductor")
            step, start = plain_step(bench, network, name), time.perf_counter()
            step()
            bench.synchronize()
            first = time.perf_counter() - start
            after = bench.measure(f"compiled, {name}", step, bench.batch)
            print(f"  {'':44} first step {first:.0f} s, then {eager / after:.2f} x as fast")


def recipes(bench: Bench) -> None:
    from stablefield.build import build_denoiser
    from stablefield.config import resolve
    from stablefield.recipes import list_recipes, read_recipe

    for name in ["digits"] if bench.small else list_recipes():
        config = resolve(read_recipe(name))
        side = 64 if "64" in name and "cifar" not in name else 8 if name == "digits" else 32
        classes = 1000 if "imagenet" in name else 0
        network = build_denoiser(config, (1 if side == 8 else 3, side, side), classes).network.to(bench.device)
        network = network.to(memory_format=torch.channels_last)
        batch = min(bench.batch, 128 if side == 64 else 512)
        x = torch.randn(batch, 1 if side == 8 else 3, side, side, device=bench.device)
        c_noise = torch.randn(batch, device=bench.device)

        def step(of: nn.Module = network, x: Tensor = x, c_noise: Tensor = c_noise) -> None:
            with autocast("bfloat16", bench.device):
                loss = of(x, c_noise).float().square().mean()
            loss.backward()
            of.zero_grad()

        with arithmetic("bfloat16"):
            bench.measure(f"{name}, forward and backward, bfloat16", step, batch)


WORK = dict(zip(PARTS, (precision, layout, targets, exact, sampling, recipes, compiled), strict=True))


@contextmanager
def part(bench: Bench, name: str, seconds: float) -> Iterator[None]:
    """Context in which a part fails for itself; the reason is kept for the end."""
    print(f"\n{name} (at most {seconds:.0f} s)", flush=True)
    bench.deadline = time.perf_counter() + seconds
    try:
        yield
    except OutOfTimeError:
        bench.missing.append(f"{name}: cut short after {seconds:.0f} s")
    except Exception as error:  # whatever one part fails with, the others are wanted
        bench.missing.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="parts to run (all)")
    parser.add_argument("--seconds", type=float, default=540, help="time for all parts together (540)")
    parser.add_argument("--self-check", action="store_true", help="tiny sizes, on the CPU")
    options = parser.parse_args()
    small = options.self_check or not torch.cuda.is_available()
    print(headline(__file__))
    if small:
        print(
            "There is no GPU here." if not options.self_check else "Self-check:", "tiny sizes on the CPU, no figures."
        )
    bench, end = Bench(torch.device("cpu" if small else "cuda"), small), time.perf_counter() + options.seconds
    for number, name in enumerate(options.parts):
        share = max(0.0, end - time.perf_counter()) / (len(options.parts) - number)
        with part(bench, name, share):
            WORK[name](bench)
    print("\nNot run:" if bench.missing else "\nEvery part ran.", *bench.missing, sep="\n  ")


if __name__ == "__main__":
    main()
