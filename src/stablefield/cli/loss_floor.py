"""The work of `stablefield floor`."""

from dataclasses import replace
from typing import Any

from stablefield.cli.progress import progress_bar
from stablefield.config import Config, ConfigError, split_targets, target_section
from stablefield.data import silent, split
from stablefield.pool import Pool
from stablefield.run import TrainedRun, training_data

_SIZES = {"stf": "size", "knn": "neighbours"}  # the key of the size, by kind of target


def training_pool(config: Config, trained: TrainedRun | None) -> Pool:
    """The data that are trained on.

    Args:
        config: configuration of the training.
        trained: the run whose data they are; None for those of the configuration.

    Raises:
        ConfigError: the data of the run have changed, or there are no labels.
    """
    source = config.make("data")
    with progress_bar("decoding") as progress:
        way_out = "put the run's data back, or measure the floor of other data with stablefield floor DATA"
        data = training_data(trained, silent, way_out=way_out) if trained else source.load(progress)
    conditional = config.training.conditional
    if conditional and data.labels is None:
        raise ConfigError("training.conditional=true needs labels, and the data have none; set it to false")
    pool, _ = split(data if conditional else replace(data, labels=None), source.holdout)
    augmented: Pool = config.make("augmentation").augment_pool(pool)
    return augmented


def floor_targets(text: str | None, config: Config, pool: Pool) -> list[str]:
    """Names of the targets whose floor is measured, as `LossFloor` has them.

    Args:
        text: targets, separated by commas; None for DSM, and the target of the configuration if its floor is another.
        config: configuration of the training.
        pool: the data that are trained on.

    Raises:
        ConfigError: the floor of one of the targets is not known.
    """
    if text is None:
        known = config["target"]["kind"] in _SIZES and config["target"].get("search") != "faiss"
        return ["dsm", *([_floor_name(config["target"], pool)] if known else [])]
    chosen = {each: target_section(each, config.allowed) for each in split_targets(text)}
    sections = {each: config.changed(target=section)["target"] for each, section in chosen.items()}
    for each, section in sections.items():
        if section.get("search") == "faiss":
            raise ConfigError(f"the floor of the target {each!r} is not known: it depends on its index")
        if section["kind"] not in ("dsm", "stf", "knn", "exact"):
            raise ConfigError(f"the floor of the target {each!r} is not known: choose from dsm, stf:N, knn:K and exact")
    return list(dict.fromkeys(_floor_name(section, pool) for section in sections.values()))


def _floor_name(section: dict[str, Any], pool: Pool) -> str:
    kind = str(section["kind"])
    return f"{kind}:{min(section[_SIZES[kind]], len(pool))}" if kind in _SIZES else kind
