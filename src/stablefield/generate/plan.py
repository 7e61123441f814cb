"""Sampling of a run into a store: everything that decides a sample except its seed, and the samples that are missing.

Each sample is written as soon as its batch is made, so an interrupted call resumes: samples that exist are not made
again. With several ranks each makes a part of them; the samples are the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from stablefield.build import build_sampler
from stablefield.config import ConfigError
from stablefield.data import Progress, silent
from stablefield.denoise import Denoiser, Guided
from stablefield.distributed import Ranks
from stablefield.generate.store import SampleStore
from stablefield.precision import arithmetic, autocast, dtype_of
from stablefield.run import TrainedRun, open_run
from stablefield.sample import Sampler, Samples
from stablefield.seeding import check_seeds


@dataclass(frozen=True, eq=False)
class SamplingPlan:
    """Everything that decides a sample except its seed.

    Attributes:
        trained: the opened run whose weights are sampled.
        denoiser: the run's denoiser, with guidance if it was requested.
        sampler: the sampler.
        label: class of all samples; None if each seed draws one.
        identity: description of all of these, which is stored with the samples.
        precision: arithmetic of the network (see `stablefield.precision`); the state is float64.
    """

    trained: TrainedRun
    denoiser: Denoiser
    sampler: Sampler
    label: int | None
    identity: dict[str, Any]
    precision: str = "float32"

    @classmethod
    def for_run(
        cls,
        run: str | Path | TrainedRun,
        *,
        sampler: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        guide: TrainedRun | None = None,
        settings: Sequence[str] = (),
        label: int | None = None,
        precision: str = "float32",
    ) -> "SamplingPlan":
        """Plan with the run's own configuration, except for what is given here.

        Args:
            run: folder of a run, a checkpoint file, or a run opened by `open_run`.
            sampler: kind of the sampler.
            steps: number of steps.
            guidance: guidance scale; None for no guidance.
            guide: weaker run to guide away from; by default the same run without classes.
            settings: settings "SECTION.KEY=VALUE" of the sections sampler and grid.
            label: class of all samples.
            precision: arithmetic of the network; the run's own precision is that of its training.

        Raises:
            ConfigError: a setting, the precision, the guidance scale or the class is not valid for this run, or a guide
                is given without a guidance scale.
            CheckpointError: there is no checkpoint, or it cannot be read.
        """
        try:
            dtype_of(precision)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        trained = run if isinstance(run, TrainedRun) else open_run(run)
        all_settings = [*settings]
        all_settings += [] if sampler is None else [f"sampler.kind={sampler}"]
        all_settings += [] if steps is None else [f"sampler.steps={steps}"]
        chosen = build_sampler(_sampling_config(trained, all_settings))
        denoiser = _with_guidance(trained.denoiser, guidance, guide)
        if label is not None and not denoiser.num_classes:
            raise ConfigError(f"no class {label}: this run was trained without classes; leave out --class")
        if label is not None and not 0 <= label < denoiser.num_classes:
            raise ConfigError(f"no class {label}: this run has {denoiser.num_classes} classes, counted from 0")
        identity = {
            "checkpoint": trained.checksum,
            "sampler": repr(chosen),
            "class": label,
            "guidance": guidance,
            "guide": guide and guide.checksum,
            **({} if precision == "float32" else {"precision": precision}),
            **({} if trained.values == "image" else {"values": trained.values}),
        }
        return cls(trained, denoiser, chosen, label, identity, precision)

    @property
    def images(self) -> bool:
        """True if the samples are images, which are written as bytes."""
        return self.trained.values == "image"

    @property
    def name(self) -> str:
        """Path that the run was opened from."""
        return str(self.trained.path)

    @property
    def device(self) -> torch.device:
        """Device that samples are made on."""
        return self.denoiser.device


def sample_to(
    run: str | Path | TrainedRun | SamplingPlan,
    out: str | Path,
    *,
    seeds: Sequence[int] = range(64),
    batch_size: int = 64,
    ranks: Ranks | None = None,
    progress: Progress = silent,
    finish: bool = True,
) -> SampleStore:
    """Sample a run into a store on disk; samples that the store holds already are not made again.

    >>> store = sample_to("runs/digits-stf", "samples", seeds=range(1000))  # doctest: +SKIP

    Args:
        run: folder of a run, a checkpoint file, an opened run, or a `SamplingPlan` for another sampler or guidance.
        out: a folder for PNG files, or FILE.npz; for floats FILE.npz or FILE.npy.
        seeds: seed of each sample, from 0 to 2^32 - 1.
        batch_size: samples per batch.
        ranks: the ranks that share the work, all of which must call this; by default this process alone.
        progress: called with (samples made, number that were missing).
        finish: True to write the files for other programs, too (see `SampleStore.finish`).

    Raises:
        ConfigError: the store holds samples of another run or sampler.
        ValueError: a seed occurs twice or is out of range.
        FloatingPointError: some samples are not finite.
        OSError: the samples cannot be written.
    """
    plan = run if isinstance(run, SamplingPlan) else SamplingPlan.for_run(run)
    ranks = ranks or Ranks(plan.device)
    check_seeds(seeds)
    # the main rank creates the store first: half created, it would look like somebody else's folder to the others
    ranks.on_main(lambda: SampleStore.open(Path(out), plan.images, plan.identity))
    store = SampleStore.open(Path(out), plan.images, plan.identity)
    missing = store.missing(seeds)
    ranks.barrier()  # a sample made before all ranks have listed the missing ones would change how these are shared
    mine, done = ranks.shard(missing), 0
    for part, samples in generate_samples(
        plan.denoiser, plan.trained.shape, plan.sampler, mine, plan.label, batch_size, plan.precision
    ):
        store.add(part, samples)
        done += len(part)
        progress(done, len(mine))
    ranks.barrier()
    if finish:
        ranks.on_main(lambda: store.finish(seeds))
    return store


def generate_samples(
    denoiser: Denoiser,
    shape: tuple[int, ...],
    sampler: Sampler,
    seeds: Sequence[int],
    label: int | None = None,
    batch_size: int = 64,
    precision: str = "float32",
) -> Iterator[tuple[Sequence[int], Samples]]:
    """Samples batch by batch.

    Args:
        denoiser: the denoiser.
        shape: shape of one sample.
        sampler: the sampler.
        seeds: seed of each sample.
        label: class of all samples; None if each seed draws one.
        batch_size: samples per batch.
        precision: arithmetic of the network.

    Yields:
        Seeds and samples of each batch.

    Raises:
        FloatingPointError: some samples are not finite.
    """
    for start in range(0, len(seeds), batch_size):
        part = seeds[start : start + batch_size]
        with arithmetic(precision), autocast(precision, denoiser.device):
            samples = sampler(denoiser, shape, seeds=part, label=label)
        if not torch.isfinite(samples.x).all():
            raise FloatingPointError(
                "some samples are not finite: the run has diverged, or the sampler does not suit it"
                + (", or float16 has overflowed: use bfloat16" if precision == "float16" else "")
            )
        yield part, samples


def _sampling_config(trained: TrainedRun, settings: Sequence[str]) -> Any:
    """The run's configuration with other settings of the sections sampler and grid."""
    if other := [setting for setting in settings if setting.partition(".")[0] not in ("sampler", "grid")]:
        raise ConfigError(f"--set {other[0]}: only sampler.* and grid.* can be set when sampling")
    return trained.config.changed(settings)


def _with_guidance(denoiser: Denoiser, guidance: float | None, guide: TrainedRun | None) -> Denoiser:
    if guidance is None:
        if guide is not None:
            raise ConfigError("a guide requires a guidance scale, for example guidance=1.5")
        return denoiser
    if not isfinite(guidance):
        raise ConfigError(f"--guidance must be finite, not {guidance}")
    return Guided(denoiser, guidance, guide.denoiser if guide else None)
