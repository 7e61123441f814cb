"""Labels of data as classes 0, 1, 2, ... without gaps.

Labels may be any whole numbers from 0, or one-hot vectors. Numbers that start at 1, have gaps or are as large as an
identity number are numbered again in their order, and each class keeps its number as its name.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from stablefield.files import printable


class Classes(NamedTuple):
    """Labels without gaps.

    Attributes:
        labels: class of each data point, counted from 0.
        names: names of the classes, as far as they are known.
        note: a line that says which labels were numbered again; "" if none were.
    """

    labels: Int64[np.ndarray, "N"]
    names: tuple[str, ...]
    note: str = ""


def class_labels(labels: Any, path: object, names: Sequence[str] = ()) -> Int64[np.ndarray, "N"]:
    """Classes, given as whole numbers or as one-hot vectors.

    Args:
        labels: the labels of all data points, as a sequence or an array.
        path: where the labels are from, for errors.
        names: name of each data point, for errors; by default its number.

    Raises:
        ValueError: the labels are neither.
    """
    where = f"labels in {printable(path)} are"
    try:
        array = np.asarray(labels)
    except (ValueError, OverflowError):
        raise ValueError(f"{where} vectors of different lengths; --no-labels (labels=false) ignores them") from None
    if array.ndim == 0:
        raise ValueError(f"{where} a single value, not one for each data point")
    if array.ndim == 2 and array.dtype.kind in "iuf" and np.isin(array, (0, 1)).all() and (array.sum(1) == 1).all():
        return array.argmax(1).astype(np.int64)
    wrong = _not_classes(array, labels)
    if len(wrong) == 0:
        return array.astype(np.int64)
    first = int(wrong[0])
    example = printable(repr(labels[first] if isinstance(labels, list) else array.tolist()[first]), 60)
    name = printable(names[first]) if names else f"data point {first}"
    raise ValueError(
        f"{where} {array.dtype} {array.shape} and not classes: they must be whole numbers from 0, or one-hot vectors, "
        f"but {name} has the label {example} ({len(wrong):,} such labels); --no-labels (labels=false) ignores them"
    )


def number_classes(labels: Int64[np.ndarray, "N"], names: Sequence[str], path: object) -> Classes:
    """Labels numbered 0, 1, 2, ... in their order, with the former numbers as names.

    Args:
        labels: labels of all data points.
        names: names of the labels from 0 on, as far as they are known.
        path: where the labels are from, for the note.
    """
    names = tuple(map(printable, names))
    present, numbered = np.unique(labels, return_inverse=True)
    if len(present) == 0 or (present[0] == 0 and present[-1] == len(present) - 1):
        return Classes(labels, names)
    kept = tuple(names[label] if label < len(names) else str(label) for label in present.tolist())
    few = present.tolist() if len(present) <= 4 else [*present[:3].tolist(), "...", int(present[-1])]
    shown = ", ".join(map(str, few))
    note = (
        f"{printable(path)}: the {len(present):,} labels that occur ({shown}) are numbered 0 to {len(present) - 1}; "
        "each class keeps its name or its former number as its name"
    )
    return Classes(numbered.astype(np.int64).reshape(-1), kept, note)


def _not_classes(array: np.ndarray, labels: Any) -> Int64[np.ndarray, "m"]:
    """Indices of the labels that are not whole numbers from 0 that fit into 63 bits."""
    if array.ndim != 1 or len(array) == 0:
        return np.arange(len(array) if array.ndim else 0)
    if array.dtype.kind not in "iuf" or (isinstance(labels, list) and bool in set(map(type, labels))):
        entries = labels if isinstance(labels, list) else array.tolist()
        return np.array([n for n, label in enumerate(entries) if type(label) is not int or not 0 <= label < 2**63])
    if array.dtype.kind == "f":
        wrong = ~(np.isfinite(array) & (array >= 0) & (array < 2**53) & (array == np.floor(array)))
    else:
        wrong = array.astype(np.int64) < 0  # uint64 beyond 63 bits becomes negative
    return wrong.nonzero()[0]
