"""The images among files, and their labels.

Labels are read from `dataset.json` in the layout of EDM and StyleGAN,

    {"labels": [["00000/img00000000.png", 6], ["00000/img00000001.png", [0, 1, 0]], ...]}     or {"labels": null}

Without that file, each top folder is a class, numbered in alphabetical order. If a single folder contains everything,
the folders in it count as the top folders.
"""

import re
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from stablefield.data.decode import SUFFIXES
from stablefield.data.files import LABELS, Files, normal_name
from stablefield.data.labels import class_labels
from stablefield.data.limits import read_json
from stablefield.data.notices import summarize
from stablefield.files import printable

# EDM's layout has folders of a thousand images, which are not classes
_EDM_NAME = re.compile(r"\d{5}/img\d{8}\.\w+")


# names of the images in order, their labels, and the names of the classes, if they are known
ImageList = tuple[list[str], Int64[np.ndarray, "N"] | None, tuple[str, ...]]


def list_images(files: Files, labelled: bool = True) -> ImageList:
    """Names of the images among files, their labels (None without), and the names of the classes.

    Args:
        files: the files.
        labelled: False to ignore labels.

    Raises:
        ValueError: there are no images; `dataset.json` is damaged or does not fit the images; labels are not classes;
            or there are images beside class folders.
    """
    names, path = files.names(), files.path
    images = [name for name in names if name.lower().endswith(SUFFIXES)]
    if not images:
        known = ", ".join(SUFFIXES)
        more = f" ({'; '.join(files.notes)})" if files.notes else ""
        raise ValueError(f"there are no images ({known}) in {printable(path)}{more}")
    if not labelled:
        return images, None, ()
    if LABELS in names:
        return _labels_of_json(images, files.read(LABELS), path)
    return _labels_of_folders(images, path)


def _labels_of_json(images: list[str], content: bytes, path: Path) -> ImageList:
    """Images with the labels in `dataset.json`."""
    name = f"{LABELS} in {printable(path)}"
    if len(content) > 2**20 + 2**16 * len(images):
        raise ValueError(f"{name} has {len(content):,} bytes; the limit is 1 MiB and 64 KiB per image")
    parsed = read_json(content, name, 1000 + 6 * len(images))
    try:
        entries, classes = parsed["labels"], tuple(map(printable, parsed.get("classes") or ()))
        listed = None if entries is None else [(normal_name(str(image)), label) for image, label in entries]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{name} is not {{"labels": [["name", label], ...]}} or {{"labels": null}}: {printable(repr(error))}'
        ) from None
    if listed is None:
        return images, None, ()
    labels = dict(listed)
    known = set(images)
    problems = {
        "has two labels for": [image for image, label in listed if labels[image] != label],
        "has no label for": [image for image in images if image not in labels],
        "has a label for": sorted(labels.keys() - known),
    }
    found = [summarize(problem, names) for problem, names in problems.items() if names]
    if found:
        which = ", which does not exist in the data" if problems["has a label for"] else ""
        raise ValueError(f"{name} {'; it '.join(found)}{which}; --no-labels (labels=false) ignores all labels")
    return images, class_labels([labels[image] for image in images], path, images), classes


def _labels_of_folders(images: list[str], path: Path) -> ImageList:
    """Images with their top folders as classes."""
    loose = [name for name in images if "/" not in name]
    if len(loose) == len(images) or all(_EDM_NAME.fullmatch(name) for name in images):
        return images, None, ()
    if loose:
        raise ValueError(
            f"{summarize(f'{printable(path)} has images beside its class folders', loose)}; move them, or ignore the "
            "labels with --no-labels (labels=false)"
        )
    folders = [name.partition("/")[0] for name in images]
    classes = sorted(set(folders))
    number = {name: label for label, name in enumerate(classes)}
    return images, np.array([number[name] for name in folders], np.int64), tuple(map(printable, classes))
