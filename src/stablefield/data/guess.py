"""What kind of data a path leads to, by what is there: so that most people need not say it."""

import re
from pathlib import Path

from stablefield.data.cifar import FILES

HUB = "hf:"


def guess_kind(source: str) -> tuple[str, str]:
    """The kind of a source, as configurations name it, and its path.

    >>> guess_kind("hf:mnist")
    ('huggingface', 'mnist')

    Raises:
        ValueError: nothing is there, or nothing that is known.
    """
    if source.startswith(HUB):
        return "huggingface", source.removeprefix(HUB)
    path = Path(source)
    if path.is_dir():
        return _folder(path), source
    if path.is_file():
        return _file(path), source
    if source == "digits":
        return "digits", ""
    raise ValueError(f"there is no file or folder {source} (a data set of the Hugging Face hub is {HUB}NAME)")


def _folder(path: Path) -> str:
    if (path / "store.json").is_file():
        return "store"
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return "huggingface"
    if path.name == "img_align_celeba" or (path / "img_align_celeba").is_dir():
        return "celeba"
    if any((path / names[0]).is_file() for choices in FILES.values() for names in choices):
        return "cifar"
    if any(path.glob("*train-images?idx*")):
        return "idx"
    return "images"


def _file(path: Path) -> str:
    name = path.name.lower()
    if name.endswith((".npy", ".npz")):
        return "arrays"
    if name.endswith(".zip"):
        return "celeba" if name.startswith("img_align_celeba") else "images"
    if re.search(r"[-.]idx\d", name) or name.endswith((".idx", ".idx.gz")):
        return "idx"
    if name.endswith((".tar", ".tar.gz", ".tgz")):
        return "cifar"
    raise ValueError(
        f"{path} has no name that tells what it is, as .zip, .npy, .npz, idx3-ubyte and .tar.gz (CIFAR) do: say --kind"
    )
