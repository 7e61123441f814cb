"""Image data sets of the Hugging Face hub, through the package `datasets`.

Some data sets come with a script that older versions of the package run to load them. Nothing here ever lets them.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from stablefield.data.contents import Contents
from stablefield.data.files import as_classes
from stablefield.data.images import Pictures, alike


@dataclass(frozen=True)
class HuggingFace(Pictures):
    """A data set of the hub, or one that `save_to_disk` wrote. Needs the extra `datasets`. A data set that is loaded by
    a script of its own is refused.

    Attributes:
        path: its name, as "mnist" or "user/name", or a folder.
        split: which part of it.
        config: which of its configurations, if it has several.
        image: the column of the images; the first one that holds images if nothing is said.
        label: the column of the labels; the first one that holds classes if nothing is said.
    """

    path: str
    split: str = "train"
    config: str | None = None
    image: str | None = None
    label: str | None = None

    def fingerprint(self) -> str:
        return f"{self.path} {self._open()._fingerprint}"

    def _contents(self) -> Contents:
        found = self._open()
        image = self._column(found, self.image, "Image")
        label = self._column(found, self.label, "ClassLabel") if self.labels else None
        if image is None:
            raise ValueError(f"{self.path} has no column of images: its columns are {', '.join(found.column_names)}")
        labels = as_classes(list(found[label]), self.path) if label else None
        names = getattr(found.features[label], "names", ()) if label else ()
        return Contents(len(found), lambda: self._decoded(found, image), labels, tuple(names))

    def _decoded(self, found: Any, image: str) -> Iterator[UInt8[np.ndarray, "1 C H W"]]:
        rules, only = self.rules(), found.select_columns([image])
        rows = ((f"image {number} of {self.path}", row[image]) for number, row in enumerate(only))
        return alike((name, rules(picture, name)) for name, picture in rows)

    def _column(self, found: Any, said: str | None, kind: str) -> str | None:
        """The column that was asked for, or the first of a kind."""
        if said is not None and said not in found.column_names:
            raise ValueError(f"{self.path} has no column {said!r}: its columns are {', '.join(found.column_names)}")
        of_kind = (name for name, feature in found.features.items() if type(feature).__name__ == kind)
        return said or next(of_kind, None)

    def _open(self) -> Any:
        try:
            import datasets
        except ImportError:
            raise ValueError(
                "data sets of the Hugging Face hub need the extra `datasets`: pip install 'stablefield[datasets]'"
            ) from None
        self._refuse_code(datasets)
        if (Path(self.path) / "state.json").is_file() or (Path(self.path) / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(self.path)
            return found[self.split] if isinstance(found, datasets.DatasetDict) else found
        if int(datasets.__version__.partition(".")[0]) < 3:
            raise ValueError(
                f"datasets {datasets.__version__} imports what the script of a data set asks for before it refuses the "
                "script: pip install 'datasets>=3'"
            )
        # versions from 4 on know no scripts, and no such argument
        takes = inspect.signature(datasets.load_dataset).parameters
        scripts = {"trust_remote_code": False} if "trust_remote_code" in takes else {}
        return datasets.load_dataset(self.path, self.config, split=self.split, **scripts)

    def _refuse_code(self, datasets: Any) -> None:
        """Raises:
        ValueError: a script, a folder with one, or the name of one of the readers of `datasets`, which look for files
            in the current folder (in versions before 5, "pandas" unpickles them).
        """
        path = Path(self.path)
        if path.suffix == ".py" or any(path.glob("*.py")):
            raise ValueError(
                f"{self.path} is loaded by a Python script, which is never run: save the data with `save_to_disk`, or "
                "remove the script if the data do not need it"
            )
        if self.path in getattr(datasets.packaged_modules, "_PACKAGED_DATASETS_MODULES", ("pandas",)):
            raise ValueError(f"{self.path!r} is a reader of files and not a data set; write ./{self.path} for a folder")
