"""Options that several commands have."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stablefield.kinds import list_kinds

if TYPE_CHECKING:
    from stablefield.generate import SamplingPlan

Allow = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MODULE:CLASS",
        help="Allow a file to name this class of yours; importing it runs its code. May be repeated.",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Set one key of the configuration; may be repeated."),
]
Device = Annotated[str, typer.Option(help="Device: auto, cpu, cuda, ...")]
Recipe = Annotated[
    str | None, typer.Option(metavar="NAME", help="Start from published settings; stablefield recipes lists them.")
]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="Data to train on: a store, ZIP file, folder, array, IDX file or tar archive, or hf:NAME for a data set "
        "of the Hugging Face hub. The kind is guessed.",
    ),
]
ConfigFile = Annotated[Path | None, typer.Option(help="TOML file with the keys that differ from the defaults.")]
Weights = Annotated[
    str | None,
    typer.Option(
        help="Weights to use: average, average-HALFLIFE, model (without averaging), or best.",
        show_default="average, or the weights of an export",
    ),
]
Batch = Annotated[int, typer.Option(min=1, max=2**20, help="Images per batch; samples do not depend on it.")]


def given_by(parameter: str, make: Callable[..., object]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator for a command that takes the arguments and options of a function in place of one of its parameters.

    Args:
        parameter: name of the parameter, which gets the result of the function.
        make: the function, or a class.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        inner = signature(make, eval_str=True).parameters

        @wraps(command)
        def wrapped(**values: Any) -> None:
            made = make(**{name: values.pop(name) for name in inner})
            command(**{parameter: made}, **values)

        flat: list[Parameter] = []
        for name, each in signature(command, eval_str=True).parameters.items():
            flat.extend(inner.values() if name == parameter else [each])
        wrapped.__signature__ = Signature([p.replace(kind=p.KEYWORD_ONLY) for p in flat])  # type: ignore[attr-defined]
        wrapped.__annotations__ = {p.name: p.annotation for p in flat}
        return wrapped

    return decorate


@dataclass(frozen=True)
class MeasuredOptions:
    """Arguments and options of commands that measure a training: its data and configuration.

    Attributes:
        source: path or name of the data; None for the data of the configuration.
        kind: kind of the data; None to guess it.
        config: file of the configuration; None for the default one.
        set_: settings "SECTION.KEY=VALUE".
        allow: classes outside this package that the configuration may name; those of `set_` are allowed, too.
        device: name of the device.
    """

    source: Annotated[
        str | None,
        typer.Argument(metavar="DATA", help='Data: a store, zip, folder, array, ..., "digits" or "hf:NAME".'),
    ] = None
    kind: Annotated[str | None, typer.Option(help="Kind of the data.", show_default="guessed from DATA")] = None
    config: Annotated[
        Path | None, typer.Option(help="Training configuration: its process, times and weight (and data) are used.")
    ] = None
    set_: Set = None
    allow: Allow = None
    device: Device = "auto"


@dataclass(frozen=True)
class SamplingOptions:
    """Options of commands that sample a run.

    Attributes:
        sampler: kind of the sampler; None for the run's own.
        steps: number of steps of the sampler; None for the run's own.
        guidance: guidance scale; None for no guidance.
        guide: folder or checkpoint of a weaker run to guide away from; None if there is none.
        set_: settings "SECTION.KEY=VALUE" of the sections sampler and grid.
        allow: classes outside this package that the runs may name; those of `sampler` and `set_` are allowed, too.
        precision: arithmetic of the network.
        device: name of the device.
    """

    sampler: Annotated[
        str | None, typer.Option(help=f"{list_kinds('sampler')}, or module:Class; by default the run's own.")
    ] = None
    steps: Annotated[int | None, typer.Option(min=1, help="Number of steps; rk45 chooses its own.")] = None
    guidance: Annotated[float | None, typer.Option(help="Guidance scale (classifier-free guidance; 1 = off).")] = None
    guide: Annotated[
        Path | None,
        typer.Option(
            help="Weaker run to guide away from (autoguidance), instead of this run without classes; requires "
            "--guidance."
        ),
    ] = None
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Set a key of sampler.* or grid.*; may be repeated."),
    ] = None
    allow: Allow = None
    precision: Annotated[str, typer.Option(help="Arithmetic of the network: float32, tf32, bfloat16 or float16.")] = (
        "float32"
    )
    device: Device = "auto"

    def given(self) -> list[str]:
        """Names of the options that are set, except `allow` and `device`, which do not concern samples."""
        named: dict[str, object] = {
            "sampler": self.sampler,
            "steps": self.steps,
            "guidance": self.guidance,
            "guide": self.guide,
        }
        named |= {"set": self.set_, "precision": None if self.precision == "float32" else self.precision}
        return [name for name, value in named.items() if value is not None]

    def open_plan(
        self, run: str | Path, device: object, *, weights: str | None = None, label: int | None = None
    ) -> "SamplingPlan":
        """Open a run, and the weaker run to guide away from, and plan its samples.

        Args:
            run: the run's folder, or a checkpoint file.
            device: device to load both runs on.
            weights: name of the weights to use; None for the first average, or those of an export.
            label: class of all samples; None to draw one for each.

        Raises:
            ConfigError: a guide is given without a guidance scale, or a class is not allowed.
        """
        from stablefield.config import ConfigError, allowed_names
        from stablefield.generate import SamplingPlan
        from stablefield.run import open_run

        settings = self.set_ or []
        allowed = allowed_names([*settings, *([f"sampler.kind={self.sampler}"] if self.sampler else [])], self.allow)
        trained = open_run(run, weights=weights, device=str(device), allow=allowed)
        if self.guide and self.guidance is None:
            raise ConfigError("--guide requires --guidance, for example --guidance 1.5")
        weaker = open_run(self.guide, device=str(device), allow=allowed) if self.guide else None
        return SamplingPlan.for_run(
            trained,
            sampler=self.sampler,
            guidance=self.guidance,
            guide=weaker,
            settings=settings,
            steps=self.steps,
            label=label,
            precision=self.precision,
        )
