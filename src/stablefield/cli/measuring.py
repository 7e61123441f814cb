"""The work of `stablefield field` and `stablefield floor`: the training that is measured, and its data."""

from stablefield.cli.options import MeasuredOptions
from stablefield.cli.progress import progress_bar
from stablefield.config import Config, ConfigError, allowed_names, overlay, override, read_toml, resolve
from stablefield.data import Source, data_section, split
from stablefield.data.identity import fingerprint, refuse_other_data
from stablefield.pool import Pool
from stablefield.run import RunFolder, TrainedRun, training_data


def configured(options: MeasuredOptions, command: str) -> Config:
    """The configuration of the training to measure, with its data.

    Args:
        options: options of the command.
        command: name of the command, for errors.

    Raises:
        ConfigError: no data are given, or the settings contradict each other.
    """
    raw = read_toml(options.config) if options.config else {}
    if options.source is None and options.kind is not None:
        raise ConfigError(
            f"--kind {options.kind} is the kind of DATA, which is missing: add DATA, or use --set "
            f"data.kind={options.kind}"
        )
    if options.source is None and "data" not in raw:
        other = "" if command == "field" else ", or --run RUN"
        raise ConfigError(f"no data given: use stablefield {command} DATA, or --config FILE with data{other}")
    if options.source is not None:
        raw = overlay(raw, {"data": data_section(options.source, options.kind)})
    settings = options.set_ or []
    return resolve(override(raw, settings), allow=allowed_names(settings, options.allow))


def training_pool(options: MeasuredOptions, config: Config, trained: TrainedRun | None, command: str) -> Pool:
    """Load the data that are trained on, with their labels, and print their size.

    Args:
        options: options of the command. If its configuration file is that of a run and names the data, they must be
            those of the run.
        config: configuration of the training.
        trained: the run whose data they are; None for those of the configuration.
        command: name of the command, for errors.

    Raises:
        ConfigError: the data of the run have changed.
    """
    source: Source = config.make("data")
    file = None if options.source else options.config
    way_out = f"restore those data, or name other data: stablefield {command} DATA"
    with progress_bar("decoding") as progress:
        data = training_data(trained, progress, way_out=way_out) if trained else source.load(progress)
    if file and file == RunFolder(file.parent).config and RunFolder(file.parent).checkpoint.exists():
        saved = RunFolder(file.parent).newest()
        if config.has_data_of(Config(saved.sections)):
            refuse_other_data(data, fingerprint(data), saved.data, f"{way_out} --config FILE")
    pool, _ = split(data, source.holdout)
    augmented: Pool = config.make("augmentation").augment_pool(pool)
    print(f"data      {source!r}: {len(augmented):,} data points of shape {augmented.shape}")
    return augmented


def aligned(rows: list[list[str]]) -> list[str]:
    """Rows of cells as lines of text, aligned on the right.

    Args:
        rows: the cells, the first row being the head.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
