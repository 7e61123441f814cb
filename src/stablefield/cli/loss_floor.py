"""The work of `stablefield floor`."""

from dataclasses import replace

from stablefield.cli.progress import progress_bar
from stablefield.config import Config, ConfigError
from stablefield.data import silent, split
from stablefield.pool import Pool
from stablefield.run import TrainedRun, training_data

__all__ = ["default_targets", "training_pool"]


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


def default_targets(config: Config, pool: Pool) -> list[str]:
    """DSM, and the target of the settings if it is a stable target.

    Args:
        config: configuration of the training.
        pool: the data that are trained on.
    """
    section = config["target"]
    return ["dsm", f"stf:{min(section['size'], len(pool))}"] if section["kind"] == "stf" else ["dsm"]
