"""Image data sets of the Hugging Face hub, loaded with the package `datasets`.

Some data sets come with a script that older versions of the package run to load them. Such scripts are never run here.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from typing_extensions import override

from stablefield.data.contents import Contents
from stablefield.data.files import class_labels
from stablefield.data.images import ImageSource, require_same_shape
from stablefield.extras import how_to_install

__all__ = ["HuggingFace"]


@dataclass(frozen=True)
class HuggingFace(ImageSource):
    """Data set of the Hugging Face hub, or a folder that `save_to_disk` wrote; requires the extra `datasets`.

    A data set that is loaded by a script of its own is refused.

    Attributes:
        path: name of the data set, such as "mnist" or "user/name", or a folder.
        split: part of the data set.
        config: configuration of the data set, if it has several.
        image: column of the images; by default the first one of type `Image`.
        label: column of the labels; by default the first one of type `ClassLabel`.
    """

    path: str
    split: str = "train"
    config: str | None = None
    image: str | None = None
    label: str | None = None

    @override
    def fingerprint(self) -> str:
        return f"{self.path} {self._open()._fingerprint}"

    @override
    def _contents(self) -> Contents:
        dataset = self._open()
        image = self._column(dataset, self.image, "Image")
        label = self._column(dataset, self.label, "ClassLabel") if self.labels else None
        if image is None:
            raise ValueError(f"{self.path} has no column of images; its columns are {', '.join(dataset.column_names)}")
        labels = class_labels(list(dataset[label]), self.path) if label else None
        names = getattr(dataset.features[label], "names", ()) if label else ()
        return Contents(len(dataset), lambda: self._decoded(dataset, image), labels, tuple(names))

    def _decoded(self, dataset: Any, image: str) -> Iterator[UInt8[np.ndarray, "1 C H W"]]:
        preprocessing, images = self.preprocessing(), dataset.select_columns([image])
        named = ((f"image {number} of {self.path}", entry[image]) for number, entry in enumerate(images))
        return require_same_shape((name, preprocessing(pixels, name)) for name, pixels in named)

    def _column(self, dataset: Any, name: str | None, kind: str) -> str | None:
        """The given column, or by default the first one of a type."""
        if name is not None and name not in dataset.column_names:
            raise ValueError(f"{self.path} has no column {name!r}; its columns are {', '.join(dataset.column_names)}")
        of_kind = (column for column, feature in dataset.features.items() if type(feature).__name__ == kind)
        return name or next(of_kind, None)

    def _open(self) -> Any:
        try:
            import datasets
        except ImportError:
            raise ValueError(how_to_install("a data set of the Hugging Face hub", "datasets")) from None
        self._refuse_code(datasets)
        if (Path(self.path) / "state.json").is_file() or (Path(self.path) / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(self.path)
            return loaded[self.split] if isinstance(loaded, datasets.DatasetDict) else loaded
        if int(datasets.__version__.partition(".")[0]) < 3:
            raise ValueError(
                f"datasets {datasets.__version__} imports the requirements of a data set's script even when it refuses "
                "the script: pip install 'datasets>=3'"
            )
        # versions from 4 on neither run scripts nor have this argument
        parameters = inspect.signature(datasets.load_dataset).parameters
        scripts = {"trust_remote_code": False} if "trust_remote_code" in parameters else {}
        return datasets.load_dataset(self.path, self.config, split=self.split, **scripts)

    def _refuse_code(self, datasets: Any) -> None:
        """Refuse scripts, folders with a script, and the names of the file readers of `datasets`.

        Those readers load files of the current folder; in versions before 5, "pandas" unpickles them.
        """
        path = Path(self.path)
        if path.suffix == ".py" or any(path.glob("*.py")):
            raise ValueError(
                f"{self.path} is loaded by a Python script, which is never run; save the data with `save_to_disk`, or "
                "remove the script if the data do not need it"
            )
        if self.path in getattr(datasets.packaged_modules, "_PACKAGED_DATASETS_MODULES", ("pandas",)):
            raise ValueError(
                f"{self.path!r} is a file reader of `datasets` and not a data set; write ./{self.path} for a folder"
            )
