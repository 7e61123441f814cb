"""`stablefield evaluate`: how good samples are, in numbers that say what they are numbers of.

Samples of a run are made first, and kept: a command that was stopped goes on, and one that is repeated finds them.
Under `torchrun` the ranks share sampling, features and distances; the numbers are the same.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from stablefield.cli.data import progress_bar
from stablefield.cli.judge import Judge
from stablefield.cli.sample import (
    Batch,
    Device,
    Guidance,
    Guide,
    SamplerKind,
    Set,
    Steps,
    Way,
    folder_of,
    make,
    opened_guide,
)
from stablefield.cli.subjects import Reference, Subject, is_run, open_reference, open_samples, told_by
from stablefield.cli.train import Allow
from stablefield.config import ConfigError
from stablefield.data import Source, split
from stablefield.evaluate import Exported, Features, Inception, Pixels, cached_classifier, known_classifier
from stablefield.evaluate.inception import DIMENSION
from stablefield.ranks import Ranks, joined
from stablefield.run import choose_device, open_run, training_data
from stablefield.seeding import parse_seeds

CUSTOM = 50_000  # samples that papers in this field score


def evaluate(
    what: Annotated[str, typer.Argument(metavar="RUN|IMAGES|NPZ", help="A run, or samples, or any data.")],
    reference: Annotated[
        str | None,
        typer.Option(metavar="DATA|STATS.npz", help="What to compare with; a run's own data, if nothing is said."),
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
            help="Also open feature files that can run code of their own: .pt2, or TorchScript that touches files.",
        ),
    ] = False,
    weights: Annotated[
        Path | None, typer.Option(help="Inception's weights, where torch-fidelity cannot download them.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=2, help="How many; of a run as many as the reference has, at most 50,000.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Of a run: which seeds, instead of 0 to samples - 1.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Of a run: how often, each time with fresh seeds.")] = 1,
    held_out: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Images the run has not seen; else the training images, one by one."),
    ] = None,
    statistics: Annotated[
        Path | None, typer.Option(metavar="STATS.npz", help="Write mean and covariance here, to be a reference.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to add the scores to; else scores.jsonl beside.")] = None,
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
    run, first = is_run(Path(what)), parse_seeds(seeds) if seeds else None
    of_runs = {"seeds": seeds, "sampler": sampler, "steps": steps, "guidance": guidance, "guide": guide, "set": set_}
    given = [name for name, value in of_runs.items() if value is not None]
    _refuse(
        (not run and given, f"--{''.join(given[:1])} is for runs, and {what} holds samples that are made already"),
        (not run and repeats > 1, "--repeats needs fresh samples each time: give a run"),
        (samples and first, "--samples counts seeds from 0, --seeds names them: say one of both"),
        (
            not (run or reference or statistics),
            "say what to compare with: --reference DATA, or STATS.npz that --statistics wrote",
        ),
        (statistics and len(features or []) > 1, "--statistics are of one kind of features: name one"),
        (out and not (run or reference), "--out is for scores, and there are none without --reference"),
    )
    with joined(choose_device(device)) as ranks:
        device, way = str(ranks.device), None
        if run:
            guiding = opened_guide(guide, guidance, device, allow or ())
            trained = open_run(what, device=device, allow=allow or ())
            way = Way.of(trained, sampler, steps, guidance, guiding, set_ or [])
        ready = None if way else open_samples(what).shortened(samples)
        compared = open_reference(reference) if reference else way and data_of(way)
        base = compared or Reference(what, ready.pool if ready else None)
        if shape := way.trained.shape if way else ready and ready.shape:
            base.refuse_unlike(shape)
        fresh = open_reference(held_out) if held_out else None
        if fresh and shape:
            fresh.refuse_unlike(shape)
        unseen = fresh.pool if fresh else base.held_out
        _refuse(
            (
                held_out and not (unseen and compared and compared.pool),
                "--held-out compares data with data, and not with statistics",
            )
        )
        images = way.trained.values == "image" if way else ready is not None and ready.images
        floats = what if not images else base.name if base.pool and not base.pool.images else None
        spaces = chosen(features or [], weights, base, ranks, floats, trust_features)
        if way:
            count = samples or min(base.n or CUSTOM, CUSTOM)
            ready = sampled(what, way, wanted(first or range(count), repeats), batch, ranks)
        assert ready is not None
        judge = Judge(ready, base, ranks, batch, out or _beside(what, run))
        judge.introduce()
        for space in spaces:
            clouds = judge.clouds(space)
            if statistics:
                judge.save(statistics, space, clouds)
            if compared:
                judge.score(space, clouds)
        if compared and compared.pool:
            judge.remember(unseen)
        if compared:
            judge.conclude()


def _refuse(*cases: tuple[object, str]) -> None:
    for wrong, message in cases:
        if wrong:
            raise ConfigError(message)


def _beside(what: str, run: bool) -> Path:
    """Where scores are added to: in a run's folder, or beside samples."""
    if run:
        return folder_of(Path(what)) / "scores.jsonl"
    return Path(f"{what.rstrip('/')}.scores.jsonl" if Path(what).exists() else "scores.jsonl")


def data_of(way: Way) -> Reference:
    """The data a run was trained on, and those it was not.

    Raises:
        ConfigError: other data have taken their place.
    """
    source: Source = way.trained.config.make("data")
    way_out = "bring those back, or score against other data with --reference PATH"
    with progress_bar("decoding") as progress:
        data = training_data(way.trained, progress, way_out=way_out)
    pool, held_out = split(data, source.holdout)
    without = f", without the {len(held_out):,} held out" if held_out else ""
    return Reference(f"{source!r}{without}", pool, held_out=held_out)


def wanted(first: Sequence[int], repeats: int) -> list[list[int]]:
    """The seeds of each repeat: those of the first, moved on as often as needed to be fresh."""
    span = max(first) + 1 - min(first)
    return [[seed + repeat * span for seed in first] for repeat in range(repeats)]


def sampled(run: str, way: Way, repeats: list[list[int]], batch: int, ranks: Ranks) -> Subject:
    """Samples of a run, made where they are not there yet; another sampler or checkpoint has another folder."""
    key = hashlib.sha256(json.dumps(way.identity, sort_keys=True).encode()).hexdigest()[:12]
    seeds = [seed for repeat in repeats for seed in repeat]
    album, _ = make(way, folder_of(Path(run)) / "evaluated" / key, seeds, batch, ranks)
    if ranks.first and album.pictures:
        album.finish(seeds)
    about = {"from": run, "images": way.trained.images, **told_by(album)}
    return Subject(repeats, album.take, way.trained.shape, about, album.images, seeds=repeats)


def chosen(
    names: Sequence[str],
    weights: Path | None,
    base: Reference,
    ranks: Ranks,
    floats: str | None,
    trusted: bool = False,
) -> list[Features]:
    """The features that were asked for, or those that suit what is compared with.

    Args:
        floats: which of both sides holds floats and not images, if one does.

    Raises:
        ConfigError: features in which it cannot be compared.
    """
    names = names or [_default(base, weights)]
    if floats and "inception" in names:
        raise ConfigError(
            f"Inception sees images, and {floats} holds floats: --features pixels compares their values; a store of "
            "floats in [-1, 1] that are images says so (stablefield data convert DATA STORE --set data.values=image)"
        )
    spaces = [_features(name, weights, base, ranks, trusted) for name in names]
    if weights and not any(isinstance(space, Inception) for space in spaces):
        raise ConfigError("--weights are Inception's: add --features inception")
    if base.statistics and (expected := base.statistics.features):
        for space in spaces:
            if space.identity != expected:
                raise ConfigError(f"{base.name} is in features {expected}, and cannot be compared in {space.identity}")
    return spaces


def _default(base: Reference, weights: Path | None) -> str:
    if weights:
        return "inception"
    if base.statistics is None:
        labelled = base.pool is not None and base.pool.labels is not None and len(base.pool.shape) == 3
        return "classifier" if labelled else "pixels"
    if identity := base.statistics.features:
        if (name := identity.partition(":")[0]) in ("classifier", "pixels", "inception"):
            return name
        # a file may not choose another file to be opened
        raise ConfigError(f"{base.name} is in features {identity}: add --features with the file of this network")
    if len(base.statistics.mean) == DIMENSION:
        return "inception"  # as published files are
    raise ConfigError(f"{base.name} does not say of which {len(base.statistics.mean):,} features: add --features")


def _features(name: str, weights: Path | None, base: Reference, ranks: Ranks, trusted: bool) -> Features:
    if name == "pixels":
        return Pixels()
    if name == "inception":
        return Inception(weights, ranks.device)
    if name != "classifier":
        return Exported(Path(name), ranks.device, trusted=trusted)
    if base.pool is None:
        return known_classifier(base.hash, device=ranks.device)
    found = partial(cached_classifier, base.pool, device=ranks.device)
    trained: list[Features] = []
    with progress_bar("training the classifier") as progress:
        ranks.lead(lambda: trained.append(found(progress=progress)))  # and put it in the cache, for the others
    return trained[0] if trained else found()
