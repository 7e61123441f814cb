"""Any map-style PyTorch data set as a source of data.

The items are read once, into memory or into a store on the disk that is mapped: references need every data point at any
time, as a fixed tensor. Random augmentation therefore belongs to `stablefield.data.augmentation` and not into the data
set; batches carry the index of each example (`Batch.index`), which the data set need not return.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from typing_extensions import override

from stablefield.data.arrays import as_tensor
from stablefield.data.contents import Contents, Progress, silent
from stablefield.data.labels import class_labels, number_classes
from stablefield.data.notices import say
from stablefield.data.sources import Source
from stablefield.data.store import Store, write_store
from stablefield.pool import Pool


@dataclass(frozen=True, eq=False)
class DatasetSource(Source):
    """Map-style data set whose items are x, (x, label, ...) or a dictionary.

    x is a tensor, an array or a Pillow image: bytes, where 0 .. 255 stands for [-1, 1], or floats, which are used as
    they are. All have one shape, images (C, H, W). A label is a whole number.

    Attributes:
        dataset: the data set, with `len` and items numbered from 0; an item must be the same each time.
        store: folder of a store that the items are written to, and mapped from; None to keep them in memory. A store
            that exists is used if its size and its first and last data points are those of the data set.
        image: key of x in a dictionary.
        label: key of the label in a dictionary; items without it have none.
    """

    dataset: Any
    store: Path | None = None
    image: str = "image"
    label: str = "label"

    @override
    def load(self, progress: Progress = silent) -> Pool:
        if self.store is None:
            contents = self.contents()
            labels = None if contents.labels is None else torch.from_numpy(contents.labels)
            return Pool(torch.from_numpy(contents.array(progress)), labels, values=self.values)
        if not (self.store / "store.json").is_file():
            write_store(self.store, self.contents(), source=type(self.dataset).__name__, progress=progress)
        pool = Store(self.store, values=self.values).load()
        ends = torch.stack([as_tensor(self._item(number)[0]) for number in (0, len(self.dataset) - 1)])
        if len(pool) != len(self.dataset) or not torch.equal(pool.stored(torch.tensor([0, len(pool) - 1])), ends):
            raise ValueError(f"{self.store} is a store of other data than this data set; remove it, or choose another")
        return pool

    @override
    def contents(self) -> Contents:
        if len(self.dataset) == 0:
            raise ValueError("the data set is empty")
        first, label = self._item(0)
        if first.tobytes() != self._item(0)[0].tobytes():
            raise ValueError(
                "item 0 of the data set differs each time; remove random augmentation from it, and use "
                "stablefield.data.EDMAugmentation or Mirror"
            )
        labels = None
        classes: tuple[str, ...] = ()
        if label is not None:
            found = [self._item(number)[1] for number in range(len(self.dataset))]
            labels, classes, note = number_classes(class_labels(found, "the data set"), (), "the data set")
            if note:
                say(note)
        return Contents(len(self.dataset), self._blocks, labels, classes, values=self.values)

    def _blocks(self) -> Iterator[Shaped[np.ndarray, "1 *D"]]:
        return (self._item(number)[0][None] for number in range(len(self.dataset)))

    def _item(self, number: int) -> tuple[np.ndarray, Any]:
        """X and the label of an item; None without a label."""
        item, label = self.dataset[number], None
        if isinstance(item, Mapping):
            if self.image not in item:
                raise ValueError(f"item {number} has no key {self.image!r}; its keys are {', '.join(map(str, item))}")
            item, label = item[self.image], item.get(self.label)
        elif isinstance(item, tuple | list):
            item, label = item[0], item[1] if len(item) > 1 else None
        label = label.item() if isinstance(label, torch.Tensor | np.generic) else label
        return _as_array(item, number), label


def _as_array(x: Any, number: int) -> np.ndarray:
    """X as uint8 or float32; Pillow images as (C, H, W)."""
    if isinstance(x, torch.Tensor):
        array = x.detach().cpu().numpy()
    elif hasattr(x, "getbands"):  # a Pillow image
        array = np.array(x)
        array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    else:
        array = np.asarray(x)
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise ValueError(f"item {number} of the data set is {array.dtype}; it must be uint8 or floating")
    return np.ascontiguousarray(array, np.uint8 if array.dtype == np.uint8 else np.float32)
