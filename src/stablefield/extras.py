"""Optional dependencies: the packages of the extra `train`, and the message that says how to install an extra."""

from collections.abc import Callable
from typing import NoReturn

TRAIN = frozenset(
    {
        "PIL",
        "accelerate",
        "matplotlib",
        "psutil",
        "pydantic",
        "rich",
        "safetensors",
        "scipy",
        "sklearn",
        "tensorboard",
        "tomli_w",
        "torchdiffeq",
        "typer",
    }
)
"""Modules that the extra `train` installs; everything that the command line and the folders of runs need."""


def how_to_install(what: str, extra: str = "train") -> str:
    """Message that names the missing extra and the command that installs it.

    Args:
        what: what needs the extra, the subject of the sentence.
        extra: name of the extra.
    """
    return f"{what} needs the extra `{extra}`: pip install '.[{extra}]' in a clone of the repository"


def needs_extra(what: str, missing: ModuleNotFoundError) -> Callable[..., NoReturn]:
    """A function that stands for one that cannot be imported: it says how to install the extra when it is called.

    Args:
        what: name of the function.
        missing: why it cannot be imported.
    """

    def fail(*_: object, **__: object) -> NoReturn:
        raise ModuleNotFoundError(how_to_install(what), name=missing.name) from missing

    return fail
