"""`stablefield train`: from a configuration to a run."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import Annotated

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from stablefield.checkpoint import read, replacing, save
from stablefield.cli.data import progress_bar
from stablefield.config import Config, ConfigError, overlay, override, read_toml, resolve
from stablefield.engine import Descent, TrainState
from stablefield.engine import train as steps_of
from stablefield.engine.train import StepReport
from stablefield.run import Folder, Parts, Trained, assemble, describe, open_run
from stablefield.schedule import EMA

# what may change when a run goes on, beside how it is sampled: how far it goes and how often it saves, not what it is
MAY_CHANGE = {"training.images", "training.save_every", "training.device"}


def train(
    out: Annotated[Path | None, typer.Option(help="Folder of the run; by default runs/DATA-TARGET.")] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file that says what is special.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one key; may be repeated.")
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:CLASS",
            help="Your own network, made as Class(shape), or Class(shape, label_dim=...) if conditional.",
        ),
    ] = None,
    from_: Annotated[
        Path | None, typer.Option("--from", help="Start from the weights of this run or checkpoint, and its recipe.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")] = False,
) -> None:
    """Train a denoiser. Without any option: the digits, with EDM's recipe and stable targets."""
    settings = [*(set_ or []), *([f"network.kind={network}"] if network else [])]
    if resume and (config or out or from_):
        raise ConfigError("--resume goes on with a run as it is; it goes with none of --config, --out and --from")
    if resume:
        folder, wanted = Folder(resume), continued(Folder(resume), settings)
    else:
        base = open_run(from_, device="cpu") if from_ else None
        raw = overlay(base.config.sections if base else {}, read_toml(config) if config else {})
        wanted = resolve(override(raw, settings))
        folder = Folder(out or Path("runs") / f"{wanted['data']['kind']}-{wanted['target']['kind']}")
    if not (resume or dry_run):
        folder.refuse_if_occupied()
    with progress_bar("decoding") as progress:
        parts = assemble(wanted, progress)
    if not resume and base:
        start_from(base, parts)
    print(summary(wanted, parts, folder))
    if dry_run:
        print(f"\n{wanted.toml()}\nThis was a dry run: nothing was trained or written.")
        return
    if not resume:
        folder.claim(wanted)
    stopped = run(wanted, parts, folder)
    if stopped:
        print(f"Stopped and saved. Go on with: stablefield train --resume {folder.path}")
        raise typer.Exit(128 + stopped)
    print(f"Done: {folder.path}. Look at it with: stablefield sample {folder.path} --seeds 0-63")


def start_from(base: Trained, parts: Parts) -> None:
    """Give a fresh denoiser the weights of a trained one.

    Raises:
        ConfigError: they are of another network, or for data of another shape.
    """
    theirs, ours = (base.shape, base.denoiser.label_dim), (parts.pool.shape, parts.denoiser.label_dim)
    if theirs != ours:
        raise ConfigError(
            f"the weights are for data {theirs[0]} with {theirs[1]} classes, and do not fit {ours[0]} with {ours[1]}"
        )
    try:
        parts.denoiser.load_state_dict(base.denoiser.state_dict())
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise ConfigError(f"the weights do not fit this network; first of all: {first}") from None


def continued(folder: Folder, settings: list[str]) -> Config:
    """The configuration of a run that goes on, with what may change changed.

    Raises:
        ConfigError: no run is there, or the settings would make it another run.
    """
    # without a checkpoint the run was stopped before its first one: then it begins
    said = read(folder.checkpoint).config["config"] if folder.checkpoint.exists() else read_toml(folder.config)
    before = resolve(said)
    after = resolve(override(before.sections, settings))
    refuse_another(before, after)
    return after


def refuse_another(before: Config, after: Config) -> None:
    """Raises:
    ConfigError: to go on with the one as the other would make it another run.
    """
    changed = [key for key in before.differences(after) if key not in MAY_CHANGE]
    if other := [key for key in changed if key.partition(".")[0] not in ("sampler", "grid")]:
        raise ConfigError(f"{', '.join(other)}: a run goes on as what it is; for another configuration start another")


def summary(config: Config, parts: Parts, folder: Folder) -> str:
    """What is about to happen, in a few lines."""
    training = config.training
    numbers = sum(p.numel() for p in parts.denoiser.parameters())
    device = next(parts.denoiser.parameters()).device
    return "\n".join(
        (
            f"data      {parts.data!r}",
            f"process   {parts.denoiser.process}, times {parts.objective.times}",
            f"target    {parts.objective.target}",
            f"network   {config['network']['kind']}, {numbers:,} parameters, on {device}",
            f"training  {training.images:,} images, {training.batch_size} a step, seed {training.seed}",
            f"run       {folder.path}",
        )
    )


def run(config: Config, parts: Parts, folder: Folder) -> int:
    """Train, or go on training, until all images are seen or a signal asks to stop; its number, or 0.

    What was trained is saved whatever ends it, an error included.

    Raises:
        ConfigError: the folder holds another run, or one that has seen more images than are asked for.
        OSError: the folder cannot be written.
    """
    training = config.training
    emas = [EMA(half_life, training.ema_ramp_up) for half_life in training.half_lives]
    state = TrainState(parts.denoiser, emas=emas, precision=getattr(torch, training.precision))
    if folder.checkpoint.exists():
        saved = read(folder.checkpoint)
        refuse_another(resolve(saved.config["config"]), config)
        if saved.images > training.images + training.batch_size:
            raise ConfigError(f"training.images = {training.images}, but this run has seen {saved.images} already")
        state.restore(saved.tensors, saved.images)
        folder.rewind(saved.images)
    with replacing(folder.config) as beside:
        beside.write_text(config.toml())
    descent = Descent(training.rate, training.clip, training.micro_batch)
    steps = steps_of(state, parts.objective, parts.batches, images=training.images, seed=training.seed, descent=descent)

    def keep() -> None:
        save(folder.checkpoint, state.tensors(), config=describe(config, parts.pool), images=state.images)

    keep()  # so that there is something to go on with from the first moment
    with _stop_signals() as stop, _progress() as progress:
        bar = progress.add_task("", total=training.images, completed=state.images, loss="", speed="")
        log, due = _Log(folder, state.images), state.images + training.save_every
        try:
            for step in steps:
                log.add(step)
                progress.update(bar, completed=step.images, loss=log.loss, speed=log.speed)
                if step.images >= due:
                    keep()
                    due += training.save_every
                if stop:
                    break
        finally:
            log.flush()
            keep()
    return stop[0] if stop else 0


class _Log:
    """Means over about a thousand images, into the metrics and onto the progress bar."""

    def __init__(self, folder: Folder, images: int) -> None:
        self.folder, self.images, self.began = folder, images, perf_counter()
        self.steps: list[StepReport] = []
        self.loss = self.speed = ""

    def add(self, step: StepReport) -> None:
        """Take note of a step."""
        self.steps.append(step)
        if step.images - self.images >= 1000:
            self.flush()

    def flush(self) -> None:
        """Write what has been noted."""
        if not self.steps:
            return
        step = self.steps[-1]
        images = step.images - self.images
        seconds = perf_counter() - self.began
        loss = float(torch.stack([s.report.loss.detach() for s in self.steps]).mean())
        ess = float(torch.stack([s.report.ess.mean() for s in self.steps]).mean())
        norm = float(torch.stack([s.gradient_norm for s in self.steps]).mean())
        self.folder.log(
            {
                "Progress/kimg": step.images / 1000,
                "Loss/loss": loss,
                "Loss/gradient_norm": norm,
                "Loss/learning_rate": step.rate,
                "Target/ess": ess,
                "Timing/sec_per_kimg": seconds / images * 1000,
            }
        )
        self.images, self.began, self.steps = step.images, perf_counter(), []
        self.loss, self.speed = f"loss {loss:.4f}", f"{images / seconds:,.0f} img/s"


def _progress() -> Progress:
    return Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
    )


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM, noted instead of obeyed, so that a step is finished and saved; a second one is obeyed."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
