"""Kind of a data set, guessed from the files that a path leads to."""

import re
from pathlib import Path
from typing import Any

from stablefield.data.cifar import SPLITS

HUB_PREFIX = "hf:"


def guess_kind(source: str) -> tuple[str, str]:
    """Kind of a source, as in `data.kind` of the configuration, and its path.

    >>> guess_kind("hf:mnist")
    ('huggingface', 'mnist')

    Args:
        source: a file or folder, "digits", or "hf:NAME" for a data set of the Hugging Face hub.

    Raises:
        ValueError: the path does not exist, or nothing there is known.
    """
    if source.startswith(HUB_PREFIX):
        return "huggingface", source.removeprefix(HUB_PREFIX)
    path = Path(source)
    if path.is_dir():
        return _kind_of_folder(path), source
    if path.is_file():
        return _kind_of_file(path), source
    if source == "digits":
        return "digits", ""
    raise ValueError(f"there is no file or folder {source}; write {HUB_PREFIX}NAME for data of the Hugging Face hub")


def data_section(source: str, kind: str | None = None) -> dict[str, Any]:
    """Section `data` of a configuration for the data at a path.

    Args:
        source: as for `guess_kind`.
        kind: kind of the data; guessed by default.

    Raises:
        ValueError: the path does not exist, or its kind cannot be guessed.
    """
    found, path = (kind, source) if kind else guess_kind(source)
    return {"kind": found, "path": path} if path else {"kind": found}


def _kind_of_folder(path: Path) -> str:
    if (path / "store.json").is_file():
        return "store"
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return "huggingface"
    if path.name == "img_align_celeba" or (path / "img_align_celeba").is_dir():
        return "celeba"
    if any((path / names[0]).is_file() for choices in SPLITS.values() for names in choices):
        return "cifar"
    if any(path.glob("*train-images?idx*")):
        return "idx"
    return "images"


def _kind_of_file(path: Path) -> str:
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
        f"cannot guess the kind of {path} from its name (known are .zip, .npy, .npz, idx3-ubyte and .tar.gz); set "
        "--kind"
    )
