"""Image data sets of the Hugging Face hub, loaded with the package `datasets`.

Some data sets come with a script that older versions of the package run to load them. Such scripts are never run here.
"""

import inspect
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import override

from stablefield.data.contents import Contents
from stablefield.data.images import ImageFiles, ImageSource
from stablefield.data.labels import class_labels
from stablefield.data.limits import MAX_FILE
from stablefield.extras import how_to_install
from stablefield.files import printable


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
        columns = printable(", ".join(dataset.column_names))
        image = self._column(dataset, self.image, "Image")
        label = self._column(dataset, self.label, "ClassLabel") if self.labels else None
        if image is None:
            raise ValueError(f"{self.where} has no column of images; its columns are {columns}")
        if type(dataset.features[image]).__name__ != "Image":
            raise ValueError(f"the column {image!r} of {self.where} is not one of images; its columns are {columns}")
        if len(dataset) == 0:
            raise ValueError(f"{self.where} contains no images in the split {self.split!r}")
        names = getattr(dataset.features[label], "names", ()) if label else ()
        content = dataset.select_columns([image]).cast_column(image, type(dataset.features[image])(decode=False))
        images = ImageFiles(
            [f"image {number}" for number in range(len(dataset))],
            lambda: nullcontext(lambda number: _read(content[number][image], f"image {number} of {self.where}")),
            self.preprocessing(),
            self.where,
            class_labels(list(dataset[label]), self.path) if label else None,
            tuple(map(printable, names)),
            () if label or not self.labels else self._other_labels(dataset),
        )
        return images.select(self.max_images, self.skip_unreadable)

    def _other_labels(self, dataset: Any) -> tuple[str, ...]:
        """A note with columns of whole numbers, which may be labels."""
        found = [name for name, feature in dataset.features.items() if "int" in str(getattr(feature, "dtype", ""))]
        if not found:
            return ()
        shown = printable(", ".join(found))
        return (
            f"{self.where} has no column of type ClassLabel and is read without labels; whole numbers are in "
            f"{shown}: data.label=COLUMN uses them",
        )

    def _column(self, dataset: Any, name: str | None, kind: str) -> str | None:
        """The given column, or by default the first one of a type."""
        columns = printable(", ".join(dataset.column_names))
        if name is not None and name not in dataset.column_names:
            raise ValueError(f"{self.where} has no column {name!r}; its columns are {columns}")
        of_kind = (column for column, feature in dataset.features.items() if type(feature).__name__ == kind)
        return name or next(of_kind, None)

    def _open(self) -> Any:
        try:
            import datasets
        except ImportError:
            raise ValueError(how_to_install("a data set of the Hugging Face hub", "datasets")) from None
        self._refuse_code(datasets)
        if (Path(self.path) / "state.json").is_file() or (Path(self.path) / "dataset_dict.json").is_file():
            return self._from_disk(datasets)
        if int(datasets.__version__.partition(".")[0]) < 3:
            raise ValueError(
                f"datasets {datasets.__version__} imports the requirements of a data set's script even when it refuses "
                "the script: pip install 'datasets>=3'"
            )
        # versions from 4 on neither run scripts nor have this argument
        parameters = inspect.signature(datasets.load_dataset).parameters
        scripts = {"trust_remote_code": False} if "trust_remote_code" in parameters else {}
        return datasets.load_dataset(self.path, self.config, split=self.split, **scripts)

    def _from_disk(self, datasets: Any) -> Any:
        try:
            loaded = datasets.load_from_disk(self.path)
        except Exception as error:  # damaged files can fail in any way
            raise ValueError(f"{self.where} cannot be read as a data set: {printable(repr(error))}") from None
        if not isinstance(loaded, datasets.DatasetDict):
            return loaded
        if self.split not in loaded:
            raise ValueError(
                f"{self.where} has no split {self.split!r}; its splits are {printable(', '.join(loaded))} (data.split)"
            )
        return loaded[self.split]

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


def _read(entry: Any, name: str) -> bytes:
    """The content of an image, which is stored in the data set or in a file beside it."""
    if not isinstance(entry, dict) or (entry.get("bytes") is None and not entry.get("path")):
        raise ValueError(f"{name} is missing")
    if entry.get("bytes") is not None:
        return bytes(entry["bytes"])
    try:
        with Path(entry["path"]).open("rb") as file:
            return file.read(MAX_FILE)
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror or error}") from None
