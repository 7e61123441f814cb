"""Decides whether a run compiles its network: `training.compile = "auto"`.

A new run on CUDA tries one step, eagerly and compiled. It compiles if it takes more than ten times as long as the
compilation did, and if the compiled gradient agrees with the eager one to the rounding of the precision: its distance
from the gradient in float32 is at most twice that of the eager one. The decision becomes part of the configuration, so
that a run that is resumed does what it did before.
"""

from collections.abc import Callable
from itertools import pairwise
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from stablefield.build import Components
from stablefield.config import Config
from stablefield.data import say
from stablefield.distributed import Ranks
from stablefield.precision import arithmetic, autocast
from stablefield.run import RunFolder
from stablefield.targets.base import keep_source

WORTHWHILE = 10  # a run must take this many times as long as the compilation
TOO_SHORT = 120.0  # seconds; for shorter runs nothing is tried
ROUNDING = 2.0**-14  # relative rounding of a gradient in float32, with a wide margin

Gradient = Callable[[str], list[Tensor]]
"""Gradient of the loss of a batch, given the precision."""


def decide_compile(config: Config, components: Components, folder: RunFolder, ranks: Ranks) -> Config:
    """The configuration with `training.compile` decided, if it is "auto".

    Args:
        config: configuration of the run.
        components: the parts of the run; unchanged.
        folder: folder of the run; if it has a checkpoint, what the run did before decides.
        ranks: this process and those it trains with, all of which must call this; the main rank decides.
    """
    if config.training.compile != "auto":
        return config
    found: list[str] = []
    ranks.on_main(lambda: found.append(_reason(config, components, folder, ranks)))
    against = found[0] if found else ""
    compiles = bool(ranks.all_gather_int(not against)[0])
    if ranks.is_main:
        say(f"training.compile=auto: {'the network is compiled' if compiles else f'not compiled, because {against}'}")
    return config.changed(training={"compile": compiles})


def _reason(config: Config, components: Components, folder: RunFolder, ranks: Ranks) -> str:
    """The reason against compiling; empty if there is none."""
    if folder.checkpoint.exists():
        return "" if Config(folder.newest().sections).training.compile is True else "the run began without"
    if ranks.device.type != "cuda":
        return f"that is tried on CUDA only, not on {ranks.device.type}"
    training, denoiser, objective = config.training, components.denoiser, components.objective
    batch = components.batches(0).to(ranks.device)
    size = min(len(batch), training.micro_batch_size or len(batch))
    t = objective.times.draw(len(batch), torch.Generator().manual_seed(training.seed))
    noisy = objective.perturb(
        denoiser.process,
        batch.x,
        t=t,
        generators=batch.generators(training.seed, "noise"),
        label=batch.label,
        augment_label=batch.augment_label,
    ).select(slice(0, size))
    parameters = [p for p in denoiser.parameters() if p.requires_grad]

    def gradient(precision: str) -> list[Tensor]:
        with arithmetic(precision, deterministic=training.deterministic), autocast(precision, ranks.device):
            loss = objective.loss(denoiser, denoiser.process, noisy, keep_source(noisy)).loss
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return [each for each in found if each is not None]

    was_training = denoiser.training
    denoiser.eval()  # dropout would differ
    try:
        repeats = training.images / (size * ranks.world_size)
        return reason_against(gradient, list(denoiser.children()), training.precision, repeats, _clock(ranks.device))
    finally:
        denoiser.train(was_training)


def _clock(device: torch.device) -> Callable[[], float]:
    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize(device)
        return perf_counter()

    return now


def reason_against(
    gradient: Gradient,
    networks: list[nn.Module],
    precision: str,
    repeats: float,
    clock: Callable[[], float],
    backend: str | Callable[..., Any] = "inductor",
) -> str:
    """Try a step eagerly and compiled; the reason against compiling, empty if there is none.

    Args:
        gradient: computes the gradient of a step, with whatever `networks` are at the time.
        networks: what is compiled; as it was at the end.
        precision: precision of the run.
        repeats: how often the run computes such a gradient.
        clock: the time in seconds, once everything asked for is computed.
        backend: backend of `torch.compile`.
    """
    reference = gradient("float32")
    gradient(precision)  # the first one chooses convolutions
    times = [clock()]
    eager = gradient(precision)
    times.append(clock())
    if (seconds := repeats * (times[1] - times[0])) < TOO_SHORT:
        return f"the run takes about {seconds:.0f} s"
    try:
        for network in networks:
            network.compile(backend=backend)
        compiled = gradient(precision)
        times.append(clock())
    except Exception as error:  # a compiler may fail in any way
        return f"it fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    finally:
        for network in networks:
            network._compiled_call_impl = None  # undoes `compile`
    step, compilation = (after - before for before, after in pairwise(times))
    if seconds <= WORTHWHILE * (compilation - step):
        return f"compiling takes {compilation - step:.0f} s, and the run about {seconds:.0f} s"
    rounding, deviation = _distance(eager, reference), _distance(compiled, reference)
    if not deviation <= 2 * rounding + ROUNDING:
        return f"its gradient is off by {deviation:.1e}, where that of the eager network is off by {rounding:.1e}"
    return ""


def _distance(gradient: list[Tensor], reference: list[Tensor]) -> float:
    """Norm of the difference, relative to that of the reference."""
    if len(gradient) != len(reference):
        return torch.inf
    difference = torch.stack([(x - y).norm() for x, y in zip(gradient, reference, strict=True)]).norm()
    return float(difference / torch.stack([y.norm() for y in reference]).norm().clamp(min=1e-30))
