"""Feature spaces by name, and those that suit a reference."""

from collections.abc import Sequence
from pathlib import Path

import torch

from stablefield.config import ConfigError
from stablefield.data import StageProgress, silent_stage
from stablefield.distributed import Ranks
from stablefield.evaluate.classifier import cached_classifier, find_classifier
from stablefield.evaluate.features import ExportedNetwork, Features, Pixels
from stablefield.evaluate.image_network import EfficientNetLite0
from stablefield.evaluate.inception import NUM_FEATURES, Inception
from stablefield.evaluate.inputs import Reference

CPU = torch.device("cpu")
Spaces = str | Path | Features | Sequence[str | Path | Features]


def open_features(
    names: Spaces,
    base: Reference,
    floats: str | None,
    ranks: Ranks,
    *,
    weights: Path | None = None,
    trusted: bool = False,
    progress: StageProgress = silent_stage,
) -> list[Features]:
    """The features of these names, or by default those that suit the reference.

    Args:
        names: "classifier", "pixels", "inception", the file of an exported network, or `Features`; one or several.
        base: the reference, or what takes its place if only statistics are computed.
        floats: name of the samples or the reference if they hold floats that are not images.
        ranks: the ranks, which have the device.
        weights: file with Inception's weights.
        trusted: also open files that can run code.
        progress: opens a progress callback while a classifier is trained.

    Raises:
        ConfigError: the features do not suit the data, the weights or the reference.
        ValueError: a file cannot be opened.
    """
    chosen = [names] if isinstance(names, str | Path | Features) else list(names)
    chosen = chosen or [_default_features(base, weights)]
    if floats and any(each == "inception" or isinstance(each, Inception) for each in chosen):
        raise ConfigError(
            f"Inception needs images, but {floats} holds floats; pass --features pixels, or, if the floats are images "
            "in [-1, 1], declare them so (stablefield data convert DATA STORE --set data.values=image)"
        )
    spaces = [
        each if isinstance(each, Features) else _open_features(str(each), base, ranks, weights, trusted, progress)
        for each in chosen
    ]
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


def _open_features(
    name: str, base: Reference, ranks: Ranks, weights: Path | None, trusted: bool, progress: StageProgress
) -> Features:
    if name == "pixels":
        return Pixels()
    if name == "inception":
        return Inception(weights, ranks.device)
    if name == EfficientNetLite0.name:
        return EfficientNetLite0(ranks.device)
    if name != "classifier":
        return ExportedNetwork(Path(name), ranks.device, trusted=trusted)
    pool, device = base.pool, ranks.device
    if pool is None:
        return ranks.from_main(lambda: find_classifier(base.hash, device=device).to(CPU)).to(device)
    # the others get the classifier itself: the caches of several machines may hold different ones
    with progress("training the classifier") as watch:
        return ranks.from_main(lambda: cached_classifier(pool, device=device, progress=watch).to(CPU)).to(device)
