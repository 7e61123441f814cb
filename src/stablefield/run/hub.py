"""Exported models of the Hugging Face hub: `hf:OWNER/NAME`, or `hf:OWNER/NAME@REVISION`.

Only the two files that `load` reads are downloaded, into the cache of `huggingface_hub`.
"""

import re
from pathlib import Path

from stablefield.checkpoint import CheckpointError
from stablefield.extras import how_to_install
from stablefield.files import printable

_NAME = re.compile(r"hf:(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?", re.ASCII)


def is_hub_name(run: str | Path) -> bool:
    """True for a name of the hub, which begins with `hf:`.

    Args:
        run: a name or a path.
    """
    return str(run).startswith("hf:")


def download(name: str) -> Path:
    """Folder with the files of an exported model, downloaded if the cache does not have them.

    With the environment variable `HF_HUB_OFFLINE=1` only the cache is used.

    Args:
        name: `hf:OWNER/NAME`; `@REVISION` after it chooses a branch, a tag or a commit, by default the main branch.

    Raises:
        CheckpointError: the name has another form, or the hub and the cache do not have such a model.
        ValueError: the package `huggingface_hub` is not installed.
    """
    if (parts := _NAME.fullmatch(name)) is None:
        raise CheckpointError(f"{name} is not the name of a model; write hf:OWNER/NAME, or hf:OWNER/NAME@REVISION")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(how_to_install("a model of the Hugging Face hub", "hub")) from None
    try:
        folder = snapshot_download(parts[1], revision=parts[2], allow_patterns=["config.json", "model.safetensors"])
    except Exception as error:  # a network can fail in any way
        reason = printable(str(error).strip().partition("\n")[0] or repr(error))
        raise CheckpointError(f"{name} cannot be read from the Hugging Face hub or its cache: {reason}") from None
    return Path(folder)
