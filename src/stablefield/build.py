"""From a configuration to the components of a training run: data, denoiser, objective and batches."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from stablefield.config import Config, ConfigError, Training
from stablefield.data import (
    Augmentation,
    BatchSource,
    LabelDropout,
    Progress,
    ShuffledBatches,
    Source,
    range_question,
    say,
    silent,
    split,
)
from stablefield.data.distances import NeighbourDistances
from stablefield.denoise import Denoiser, Preconditioned
from stablefield.distributed import Ranks
from stablefield.kernel.accumulator import float64_device
from stablefield.objective import Objective
from stablefield.pool import Pool
from stablefield.sample import Sampler
from stablefield.seeding import derive
from stablefield.targets import ExactTarget, Prefetched, Shard, Sharded, STFTarget, TargetEstimator
from stablefield.times import Stratified

LOGGER = logging.getLogger("stablefield")


@dataclass(frozen=True, eq=False)
class Components:
    """The components of a training run.

    Attributes:
        data: all data of the source, with labels if it has any.
        pool: the data that are trained on and that references come from; without labels if training is unconditional.
        denoiser: a denoiser with initial weights, on the device of the run.
        objective: times, target and loss weight.
        batches: the batches of each step, augmented.
        held_out: data points that are neither trained on nor used as references; with labels if the pool has them.
    """

    data: Pool
    pool: Pool
    denoiser: Denoiser
    objective: Objective
    batches: BatchSource
    held_out: Pool | None = None


def build(
    config: Config,
    progress: Progress = silent,
    ranks: Ranks | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> Components:
    """Load the data and make every component of a training run.

    Args:
        config: the resolved configuration.
        progress: called with (done, total) while data are decoded or measured.
        ranks: this process and those it trains with; by default a single process on the configured device.
        weights: weights that the denoiser must fit; they are not loaded.

    Raises:
        ValueError: the data cannot be loaded, or components do not fit them (sizes, shapes, missing labels).
    """
    training = config.training
    if training.deterministic:  # cuBLAS reads this variable when it is first used
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    ranks = ranks or Ranks(choose_device(training.device))
    source: Source = config.make("data")
    data = source.load(progress)
    if ranks.is_main and (question := range_question(data, config.sigma_data)):
        say(f"{source.where}: {question}")
    if training.sample_every and not data.images:
        raise ConfigError(
            f"cannot draw sheets of samples of data with shape {data.shape} and values={data.values}; set "
            "training.sample_every=0, or data.values=image if they are images in [-1, 1]"
        )
    if training.conditional and data.labels is None:
        raise ConfigError("training.conditional=true needs labels, and the data have none; set it to false")
    pool, held_out = _split(data if training.conditional else replace(data, labels=None), source.holdout)
    augmentation: Augmentation = config.make("augmentation")
    try:
        pool = augmentation.augment_pool(pool)
    except ValueError as error:
        raise ConfigError(f"augmentation: {error}") from None
    if not training.target_sharding:
        pool = resident(pool, ranks.device, training.resident_share)
    times = Stratified(config.make("times")) if training.stratified else config.make("times")
    order = ShuffledBatches(pool, training.batch_size, training.seed, ranks.rank, ranks.world_size, ranks.device)
    target = _build_target(config, order, augmentation, ranks, progress)
    denoiser = place(build_denoiser(config, pool.shape, pool.num_classes, weights), ranks.device)
    _check_network(denoiser, pool, augmentation.augment_dim)
    batches = augmentation.augment_batches(order, training.seed, ranks.device)
    if training.label_dropout:
        batches = LabelDropout(batches, training.label_dropout, training.seed)
    objective = Objective(times, target, config.make("weight"))
    return Components(data, pool, denoiser, objective, batches, held_out)


def _split(data: Pool, holdout: int) -> tuple[Pool, Pool | None]:
    """The data that are trained on, and those that are held out."""
    present = [] if data.labels is None else data.labels.unique().tolist()
    if present != list(range(len(present))):  # a class without data points would be sampled from, but never trained
        missing = next(label for label, found in enumerate(present) if label != found)
        raise ConfigError(
            f"conditional training needs classes counted from 0 without gaps: class {missing} has no data points, but "
            f"there is a class {present[-1]}; renumber the labels"
        )
    try:
        pool, held_out = split(data, holdout)
    except ValueError as error:
        raise ConfigError(f"data: {error}") from None
    if pool.labels is not None and len(pool.labels.unique()) < len(present):
        raise ConfigError(f"data.holdout={holdout} leaves no data points of some class to train on; hold out fewer")
    return pool, held_out


def _build_target(
    config: Config, order: ShuffledBatches, augmentation: Augmentation, ranks: Ranks, progress: Progress
) -> TargetEstimator:
    """The target estimator; STF with references for the whole data set is computed as the exact target."""
    pool = order.pool
    try:
        target: TargetEstimator = config.make("target", pool, order, augmentation)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"target: {error}") from None
    if type(target) is STFTarget and target.size >= len(pool) and target.augmented_size == 1:
        if ranks.is_main:
            LOGGER.warning(
                "target.size = %d is not below the %d data points: using the exact target over all of them",
                target.size,
                len(pool),
            )
        target = ExactTarget(pool)
    if type(target) is ExactTarget:
        return _prepare_exact(target, config.training, ranks, progress)
    if config.training.target_sharding:
        raise ConfigError(
            "training.target_sharding is for targets that average over all data, not target.kind="
            f"{config.kind('target')!r}; set target.kind=exact or leave it out"
        )
    return target


def _prepare_exact(target: ExactTarget, training: Training, ranks: Ranks, progress: Progress) -> TargetEstimator:
    """The exact target, computed for several steps at once and sharded if that is configured."""
    if target.missing_mass:
        distances = NeighbourDistances(target.pool, device=float64_device(ranks.device), progress=progress)
        known = distances.prepare(null_label=training.label_dropout > 0)
        target = replace(target, distances=known)
        if known is None and ranks.is_main:
            LOGGER.warning(
                "distances between the %d data points are not measured: the search would take longer than it saves",
                len(target.pool),
            )
    if not training.target_sharding:
        return Prefetched(target, training.target_prefetch)
    # each rank moves only its own part to its device
    keep = partial(resident, device=ranks.device, share=training.resident_share)
    shard = Shard(ranks.rank, ranks.world_size, ranks.all_gather, keep)
    return Prefetched(Sharded(target, shard), training.target_prefetch)


def resident(pool: Pool, device: torch.device, share: float) -> Pool:
    """The pool on a GPU, if its data need only a small share of the memory there; otherwise the pool as it is.

    On a CPU it also stays as it is: data mapped from a file are in memory once for all processes of a machine.

    Args:
        pool: the data.
        device: device of the run.
        share: largest share of the GPU's memory that the data may need.
    """
    if device.type != "cuda" or pool.nbytes > share * torch.cuda.get_device_properties(device).total_memory:
        return pool
    return pool.to(device)


def place(denoiser: Preconditioned, device: torch.device) -> Preconditioned:
    """The denoiser on a device; on a GPU its weights are stored channels last, as convolutions there read them.

    Args:
        denoiser: the denoiser, moved in place.
        device: the device.
    """
    layout: dict[str, Any] = {"memory_format": torch.channels_last} if device.type == "cuda" else {}
    return denoiser.to(device, **layout)


def build_denoiser(
    config: Config, shape: tuple[int, ...], num_classes: int, weights: Mapping[str, torch.Tensor] | None = None
) -> Preconditioned:
    """A denoiser with initial weights, which follow from the seed of the run.

    The network is first built without memory for its weights, so that one that asks for more than the machine has, or
    does not fit the weights of a file, is refused before any memory is used. A user's network that cannot be built in
    this way is only compared when its weights are loaded.

    Args:
        config: the resolved configuration.
        shape: shape of one data point.
        num_classes: number of classes that the network is conditioned on; 0 for none.
        weights: weights that the denoiser must fit; they are not loaded.

    Raises:
        ConfigError: the network cannot be made with these arguments, or does not fit the weights.
    """

    def make(device: str) -> Preconditioned:
        classes = {"num_classes": num_classes} if num_classes else {}
        with torch.random.fork_rng([]), torch.device(device):
            torch.manual_seed(derive(config.training.seed, "weights"))
            try:
                network = config.make("network", shape=shape, **classes)
            except ConfigError:
                raise
            except Exception as error:  # a user's network may fail in any way
                reason = _describe(error)
                raise ConfigError(f"the network {kind!r} cannot be made for data {shape}: {reason}") from error
        return Preconditioned(network, config.make("process"), config.make("preconditioning"), num_classes)

    kind = config.kind("network")
    try:
        sizes = {name: (tuple(tensor.shape), tensor.nbytes) for name, tensor in make("meta").state_dict().items()}
    except Exception as error:  # a user's network may need real tensors
        if ":" not in kind:
            raise
        if weights is not None:
            say(f"the network {kind!r} is not compared with the weights before it is built: {_describe(error)}")
    else:
        _check_size(sizes, kind, weights)
    return make("cpu")


def _check_size(
    sizes: Mapping[str, tuple[tuple[int, ...], int]], kind: str, weights: Mapping[str, torch.Tensor] | None
) -> None:
    """Refuse a network that does not fit weights, or the memory of this machine, by its shapes and bytes."""
    needed = sum(octets for _, octets in sizes.values())
    if weights is not None:
        for name in sorted(sizes.keys() | weights.keys()):
            here = sizes[name][0] if name in sizes else None
            there = tuple(weights[name].shape) if name in weights else None
            if here != there:
                raise ConfigError(f"the network {kind!r} has {name} of shape {here}, and the weights have {there}")
    if hasattr(os, "sysconf") and needed > (memory := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
        raise ConfigError(
            f"the network {kind!r} needs {needed / 1e9:,.0f} GB for its weights, and this machine has "
            f"{memory / 1e9:,.0f} GB of memory; choose fewer channels"
        )


@torch.no_grad()
def _check_network(denoiser: Preconditioned, pool: Pool, augment_dim: int) -> None:
    """Call the network once, so that one that fails or returns another shape is refused before the run begins."""
    parameter = next(denoiser.parameters(), None)
    if parameter is None:
        raise ConfigError("the network has no parameters to train")
    x = torch.zeros(2, *pool.shape, device=parameter.device)
    t = torch.full((2,), 0.5, device=parameter.device)
    label = None if pool.labels is None else torch.zeros(2, dtype=torch.int64, device=parameter.device)
    augment_label = torch.zeros(2, augment_dim, device=parameter.device) if augment_dim else None
    try:
        denoised = denoiser.eval()(x, t, label, augment_label)
    except Exception as error:
        raise ConfigError(f"the network fails for data of shape {pool.shape}: {_describe(error)}") from error
    if denoised.shape != x.shape:
        raise ConfigError(f"the network returns the shape {tuple(denoised.shape)} for an input {tuple(x.shape)}")


def _describe(error: Exception) -> str:
    first = str(error).partition("\n")[0]  # torch appends a trace of its own to some errors
    return f"{type(error).__name__}: {first}"


def build_sampler(config: Config) -> Sampler:
    """The sampler of a configuration, with its time grid.

    Args:
        config: the resolved configuration.
    """
    return config.make("sampler", config.make("grid"))


def choose_device(name: str) -> torch.device:
    """The device of a name.

    Args:
        name: a name as torch has it, or "auto" for a GPU if there is one and the CPU if not.

    Raises:
        ConfigError: this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"there is no device {name!r} here: {str(error).splitlines()[0]}") from None
