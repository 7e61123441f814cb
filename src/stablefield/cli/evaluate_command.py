"""`stablefield evaluate`: scores of samples, written together with everything that they depend on.

For a run, samples are made first and kept, so that an interrupted command resumes and a repeated one finds them. Under
`torchrun` the ranks share sampling, features and distances; the scores are the same.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from stablefield.build import choose_device
from stablefield.cli.options import Allow
from stablefield.cli.progress import progress_bar
from stablefield.cli.sample_command import (
    Batch,
    Device,
    Guidance,
    Guide,
    SamplerKind,
    SamplingPlan,
    Set,
    Steps,
    make_samples,
    open_guide,
    run_folder,
)
from stablefield.cli.sample_source import Reference, SampleSource, is_run, open_reference, open_samples
from stablefield.cli.scorer import Scorer
from stablefield.config import ConfigError
from stablefield.data import Source, split
from stablefield.distributed import Ranks, process_group
from stablefield.evaluate import ExportedNetwork, Features, Inception, Pixels, cached_classifier, find_classifier
from stablefield.evaluate.inception import NUM_FEATURES
from stablefield.run import open_run, training_data
from stablefield.seeding import parse_seeds

__all__ = ["evaluate"]

_USUAL_SAMPLES = 50_000  # number of samples that papers report FID of


def evaluate(
    what: Annotated[
        str, typer.Argument(metavar="RUN|IMAGES|NPZ", help="A run, samples, or data of any kind that `train` reads.")
    ],
    reference: Annotated[
        str | None,
        typer.Option(metavar="DATA|STATS.npz", help="Data or statistics to compare with; by default a run's own data."),
    ] = None,
    features: Annotated[
        list[str] | None,
        typer.Option(
            help="classifier (trained on the reference's labels), pixels, inception (FID), or the file of a "
            "TorchScript network; may be repeated."
        ),
    ] = None,
    trust_features: Annotated[
        bool,
        typer.Option(
            "--trust-features",
            help="Also open feature files that can run code: .pt2, or TorchScript that reads or writes files.",
        ),
    ] = False,
    weights: Annotated[
        Path | None,
        typer.Option(help="File with Inception's weights; by default torch-fidelity downloads them."),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=2, help="Number of samples; by default all, or for a run as many as the reference holds, up to 50,000."
        ),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Seeds of a run's samples; by default 0 to the number of samples - 1.")
    ] = None,
    repeats: Annotated[
        int, typer.Option(min=1, help="Repeats, each with new samples of the run from other seeds.")
    ] = 1,
    held_out: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Data that the run was not trained on, for the memorisation scores; by default the data it held out, "
            "or its training data, each compared with all others.",
        ),
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(metavar="STATS.npz", help="Write mean and covariance of the features here, for --reference."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="File to append the scores to; by default scores.jsonl in the run or beside the samples."),
    ] = None,
    sampler: SamplerKind = None,
    steps: Steps = None,
    guidance: Guidance = None,
    guide: Guide = None,
    set_: Set = None,
    allow: Allow = None,
    batch: Batch = 64,
    device: Device = "auto",
) -> None:
    """Score a run or samples: Frechet and kernel distance, precision and recall, memorisation; with Inception, FID."""
    run, first_seeds = is_run(Path(what)), parse_seeds(seeds) if seeds else None
    for_runs = {"seeds": seeds, "sampler": sampler, "steps": steps, "guidance": guidance, "guide": guide, "set": set_}
    given = [name for name, value in for_runs.items() if value is not None]
    _refuse_if(
        (not run and given, f"--{''.join(given[:1])} is for runs, but {what} holds samples that exist already"),
        (not run and repeats > 1, f"--repeats {repeats} needs new samples for each repeat; pass a run"),
        (samples and first_seeds, "--samples and --seeds exclude each other; pass one of them"),
        (
            not (run or reference or statistics),
            "there is no reference; pass --reference DATA, or a STATS.npz file that --statistics wrote",
        ),
        (
            statistics and len(features or []) > 1,
            f"--statistics holds one kind of features, not {len(features or [])}; pass --features once",
        ),
        (out and not (run or reference), "--out is for scores, which need a reference; pass --reference"),
    )
    with process_group(choose_device(device)) as ranks:
        device, plan = str(ranks.device), None
        if run:
            weaker = open_guide(guide, guidance, device, allow or ())
            trained = open_run(what, device=device, allow=allow or ())
            plan = SamplingPlan.for_run(trained, sampler, steps, guidance, weaker, set_ or [])
        source = None if plan else open_samples(what).first(samples)
        compared = open_reference(reference) if reference else plan and _training_data(plan)
        base = compared or Reference(what, source.pool if source else None)
        if shape := plan.trained.shape if plan else source and source.shape:
            base.check_shape(shape)
        other = open_reference(held_out) if held_out else None
        if other and shape:
            other.check_shape(shape)
        held_out_pool = other.pool if other else base.held_out
        _refuse_if(
            (
                held_out and not (held_out_pool and compared and compared.pool),
                "--held-out needs data, not statistics, both itself and as --reference",
            )
        )
        images = plan.trained.values == "image" if plan else source is not None and source.images
        floats = what if not images else base.name if base.pool and not base.pool.images else None
        spaces = _feature_spaces(features or [], weights, base, ranks, floats, trust_features)
        if plan:
            count = samples or min(base.n or _USUAL_SAMPLES, _USUAL_SAMPLES)
            source = _sample_run(what, plan, _repeated_seeds(first_seeds or range(count), repeats), batch, ranks)
        assert source is not None
        scorer = Scorer(source, base, ranks, batch, out or _scores_file(what, run))
        scorer.print_header()
        for space in spaces:
            sets = scorer.compute_features(space)
            if statistics:
                scorer.write_statistics(statistics, space, sets)
            if compared:
                scorer.score(space, sets)
        if compared and compared.pool:
            scorer.score_memorisation(held_out_pool)
        if compared:
            scorer.print_path()


def _refuse_if(*cases: tuple[object, str]) -> None:
    """Raise an error with the message of the first condition that holds."""
    for condition, message in cases:
        if condition:
            raise ConfigError(message)


def _scores_file(what: str, run: bool) -> Path:
    """Default file of the scores: in a run's folder, or beside the samples."""
    if run:
        return run_folder(Path(what)) / "scores.jsonl"
    return Path(f"{what.rstrip('/')}.scores.jsonl" if Path(what).exists() else "scores.jsonl")


def _training_data(plan: SamplingPlan) -> Reference:
    """The data that a run was trained on, and those that it held out; refused if the data have changed since."""
    source: Source = plan.trained.config.make("data")
    way_out = "restore those, or score against other data with --reference PATH"
    with progress_bar("decoding") as progress:
        data = training_data(plan.trained, progress, way_out=way_out)
    pool, held_out = split(data, source.holdout)
    without = f", without the {len(held_out):,} held out" if held_out else ""
    return Reference(f"{source!r}{without}", pool, held_out=held_out)


def _repeated_seeds(first: Sequence[int], repeats: int) -> list[list[int]]:
    """Seeds of each repeat: those of the first, shifted so that no seed occurs twice."""
    span = max(first) + 1 - min(first)
    return [[seed + repeat * span for seed in first] for repeat in range(repeats)]


def _sample_run(run: str, plan: SamplingPlan, repeats: list[list[int]], batch_size: int, ranks: Ranks) -> SampleSource:
    """Samples of a run, made if they do not exist; each plan has its own folder."""
    key = hashlib.sha256(json.dumps(plan.identity, sort_keys=True).encode()).hexdigest()[:12]
    seeds = [seed for repeat in repeats for seed in repeat]
    store, _ = make_samples(plan, run_folder(Path(run)) / "evaluated" / key, seeds, batch_size, ranks)
    if ranks.is_main and store.png:
        store.finish(seeds)
    metadata = {"name": run, "training_images": plan.trained.images, **store.metadata()}
    return SampleSource(repeats, store.take, plan.trained.shape, metadata, store.images, seeds=repeats)


def _feature_spaces(
    names: Sequence[str],
    weights: Path | None,
    base: Reference,
    ranks: Ranks,
    floats: str | None,
    trusted: bool = False,
) -> list[Features]:
    """The features of these names, or by default those that suit the reference.

    Args:
        names: values of --features.
        weights: file with Inception's weights.
        base: the reference, or what takes its place if statistics are written only.
        ranks: the ranks, which have the device.
        floats: name of the samples or the reference if they hold floats that are not images.
        trusted: also open files that can run code.
    """
    names = names or [_default_features(base, weights)]
    if floats and "inception" in names:
        raise ConfigError(
            f"Inception needs images, but {floats} holds floats; pass --features pixels, or, if the floats are images "
            "in [-1, 1], declare them so (stablefield data convert DATA STORE --set data.values=image)"
        )
    spaces = [_open_features(name, weights, base, ranks, trusted) for name in names]
    if weights and not any(isinstance(space, Inception) for space in spaces):
        raise ConfigError(f"--weights {weights} are for Inception; add --features inception")
    if base.statistics and (expected := base.statistics.features):
        for space in spaces:
            if space.identity != expected:
                raise ConfigError(f"{base.name} is in features {expected} and cannot be compared in {space.identity}")
    return spaces


def _default_features(base: Reference, weights: Path | None) -> str:
    """Name of the features that suit the reference."""
    if weights:
        return "inception"
    if base.statistics is None:
        labelled = base.pool is not None and base.pool.labels is not None and len(base.pool.shape) == 3
        return "classifier" if labelled else "pixels"
    if identity := base.statistics.features:
        if (name := identity.partition(":")[0]) in ("classifier", "pixels", "inception"):
            return name
        # a file must not choose which other file is opened
        raise ConfigError(f"{base.name} is in features {identity}; add --features with the file of this network")
    if len(base.statistics.mean) == NUM_FEATURES:
        return "inception"  # as in published files
    raise ConfigError(f"{base.name} does not say which {len(base.statistics.mean):,} features it is in; add --features")


def _open_features(name: str, weights: Path | None, base: Reference, ranks: Ranks, trusted: bool) -> Features:
    if name == "pixels":
        return Pixels()
    if name == "inception":
        return Inception(weights, ranks.device)
    if name != "classifier":
        return ExportedNetwork(Path(name), ranks.device, trusted=trusted)
    if base.pool is None:
        return find_classifier(base.hash, device=ranks.device)
    load = partial(cached_classifier, base.pool, device=ranks.device)
    trained: list[Features] = []
    with progress_bar("training the classifier") as progress:
        ranks.on_main(lambda: trained.append(load(progress=progress)))  # the others then find it in the cache
    return trained[0] if trained else load()
