"""Damaged files of every format are read or refused: no other error, no code, and little memory."""

import gzip
import io
import random
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from data_files import cifar_files, damaged, edm_files, make_mnist, make_tar, make_zip, noise, png

from stablefield.config import resolve
from stablefield.data import Contents, guess_kind, write_store
from stablefield.pool import Pool, torch

pytestmark = pytest.mark.usefixtures("unchecked")

IMAGES, LABELS = noise(6, 3, 8, 8), [0, 2, 1, 1, 0, 2]
FORMS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "TGA", "JPEG2000", "AVIF", "PCX", "SGI", "ICO", "DDS")


def samples(folder: Path) -> dict[str, tuple[Path, str]]:
    """Valid data of every format: the path of the data, and the file to damage, relative to the folder."""
    np.save(folder / "x.npy", IMAGES)
    np.savez(folder / "x.npz", data=IMAGES, labels=np.array(LABELS))
    np.savez_compressed(folder / "y.npz", data=IMAGES / 255, classes=np.array(list("abc")))
    make_zip(folder / "x.zip", edm_files(IMAGES, LABELS))
    make_mnist(folder / "mnist", IMAGES[:, 0], np.array(LABELS, np.uint8))
    make_mnist(folder / "plain", IMAGES[:, 0], np.array(LABELS, np.uint8), packed=False)
    make_tar(folder / "x.tar.gz", cifar_files(noise(6, 3, 32, 32), LABELS))
    (folder / "x.tar").write_bytes(gzip.decompress((folder / "x.tar.gz").read_bytes()))
    write_store(folder / "store", Contents.from_pool(Pool(torch.from_numpy(IMAGES), torch.tensor(LABELS))), source="x")
    files = {name: (folder / name, name) for name in ("x.npy", "x.npz", "y.npz", "x.zip", "x.tar.gz", "x.tar")}
    files |= {f"store/{name}": (folder / "store", f"store/{name}") for name in ("data.npy", "labels.npy", "store.json")}
    for name in ("mnist/train-images-idx3-ubyte.gz", "plain/train-images-idx3-ubyte", "plain/train-labels-idx1-ubyte"):
        files[name] = (folder / name.partition("/")[0], name)
    for form in FORMS:
        try:
            content = png(IMAGES[0], form)
        except (OSError, KeyError):
            continue  # this build of Pillow does not write the format
        place = folder / form
        place.mkdir()
        (place / "a.png").write_bytes(content)
        files[form] = (place, f"{form}/a.png")
    (folder / "labelled").mkdir()
    (folder / "labelled/a.png").write_bytes(png(IMAGES[0]))
    (folder / "labelled/dataset.json").write_bytes(b'{"labels": [["a.png", 3]], "classes": ["a", "b", "c", "d"]}')
    files["dataset.json"] = (folder / "labelled", "labelled/dataset.json")
    return files


def attack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: int, seed: int) -> None:
    monkeypatch.setenv("STABLEFIELD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("stablefield.data.store._remember", lambda *arguments: None)
    warnings.simplefilter("ignore")
    folder = tmp_path / "data"
    folder.mkdir()
    found = samples(folder)
    draw = random.Random(seed)
    refused: list[str] = []
    for name, (path, file) in found.items():
        whole = (folder / file).read_bytes()
        for number in range(rounds):
            content = damaged(whole, draw)
            (folder / file).write_bytes(content)
            try:
                kind, place = guess_kind(str(path))
                source = resolve({"data": {"kind": kind, "path": place}}).make("data")
                source.load()
                source.contents()
            except ValueError as error:
                refused.append(str(error))
            except Exception as error:
                (tmp_path / "culprit").write_bytes(content)
                pytest.fail(f"{name}, round {number}: {error!r} instead of a ValueError; see {tmp_path / 'culprit'}")
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        (folder / file).write_bytes(whole)
    assert len(refused) > rounds * len(found) / 4
    raw = [message for message in refused if not message.replace("\n", "").isprintable()]
    assert raw == []


def test_damaged_files_are_read_or_refused(tmp_path, monkeypatch):
    attack(tmp_path, monkeypatch, 4, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_many_damaged_files_are_read_or_refused(seed, tmp_path, monkeypatch):
    attack(tmp_path, monkeypatch, 150, seed)


def test_the_attack_damages_files():
    draw = random.Random(0)
    assert sum(damaged(bytes(range(256)), draw) != bytes(range(256)) for _ in range(100)) > 90
    assert io.BytesIO(png(IMAGES[0])).read(4) == b"\x89PNG"
