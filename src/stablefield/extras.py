"""Optional dependencies: the packages of the extra `train`, and the message that says how to install an extra."""

__all__ = ["TRAIN", "how_to_install"]

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
