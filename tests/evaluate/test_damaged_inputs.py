"""Damaged samples and statistics are scored or refused: no other error, and little memory."""

import random
import shutil
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from data_files import damaged, noise
from PIL import Image
from short_runs import trained

from stablefield.evaluate.inputs import open_reference, open_samples
from stablefield.generate import sample_to

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Samples in every form, and statistics."""
    folder = tmp_path_factory.mktemp("inputs")
    trained(folder / "run", "training.images=32", "sampler.steps=2", "training.conditional=true")
    sample_to(folder / "run", folder / "samples", seeds=range(2))
    sample_to(folder / "run", folder / "samples.npz", seeds=range(2))
    np.savez(folder / "statistics.npz", mu=np.zeros(4), sigma=np.eye(4), n=9, features="pixels", data="")
    np.save(folder / "bytes.npy", noise(6, 8, 8, 3))
    return folder


FILES = {
    "samples/000000/000001.png": "samples",
    "samples/samples.json": "samples",
    "samples/evaluations.txt": "samples",
    "samples.npz": "samples.npz",
    "samples.parts/samples.json": "samples.npz",
    "statistics.npz": "statistics.npz",
    "bytes.npy": "bytes.npy",
}


def attack(inputs: Path, folder: Path, rounds: int, seed: int) -> None:
    warnings.simplefilter("ignore")
    shutil.copytree(inputs, folder)
    draw, refused = random.Random(seed), 0
    for name, path in FILES.items():
        whole = (folder / name).read_bytes()
        for number in range(rounds):
            content = damaged(whole, draw)
            (folder / name).write_bytes(content)
            try:
                if path == "statistics.npz":
                    open_reference(folder / path)
                else:
                    source = open_samples(folder / path)
                    source.take(source.repeats[0])
            except ValueError:
                refused += 1
            except Exception as error:
                (folder.parent / "culprit").write_bytes(content)
                pytest.fail(f"{name}, round {number}: {error!r} is not a ValueError; see {folder.parent / 'culprit'}")
        (folder / name).write_bytes(whole)
    assert refused > rounds


def test_damaged_samples_and_statistics_are_read_or_refused(inputs, tmp_path):
    attack(inputs, tmp_path / "inputs", 15, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_damaged_samples_and_statistics_are_read_or_refused(seed, inputs, tmp_path):
    attack(inputs, tmp_path / "inputs", 300, seed)


def test_samples_of_different_shapes_are_refused_by_name(inputs, tmp_path):
    folder = shutil.copytree(inputs / "samples", tmp_path / "samples")
    store = sample_to(inputs / "run", inputs / "samples", seeds=range(2))
    Image.new("L", (3, 3)).save(folder / store.path(1).relative_to(inputs / "samples"))
    source = open_samples(folder)
    with pytest.raises(ValueError, match=r"000001\.png has the shape \(1, 3, 3\), and not \(1, 8, 8\) as .*000000"):
        source.take(source.repeats[0])


def test_statistics_that_expand_beyond_the_limit_are_refused(tmp_path):
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, count in (("mu", 2), ("sigma", 2**25 + 1)):  # 256 MiB and one number
            with archive.open(f"{name}.npy", "w") as file:
                header = {"descr": "<f8", "fortran_order": False, "shape": (count,)}
                np.lib.format.write_array_header_1_0(file, header)
                for _ in range(0, 8 * count, 2**23):
                    file.write(bytes(2**23))
    with pytest.raises(ValueError, match=r"bomb\.npz holds no usable statistics: .*bomb\.npz"):
        open_reference(path)


def test_images_as_bytes_have_channels_last_in_arrays_too(tmp_path):
    pixels = noise(6, 8, 8, 3)
    np.save(tmp_path / "last.npy", pixels)
    np.save(tmp_path / "first.npy", pixels.transpose(0, 3, 1, 2))
    last, first = (open_samples(tmp_path / f"{name}.npy") for name in ("last", "first"))
    assert last.shape == first.shape == (3, 8, 8)
    assert (last.take(range(6)) == first.take(range(6))).all()


def test_the_way_out_for_arrays_whose_axes_are_not_known_exists(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((6, 8, 8, 3), np.float32))
    with pytest.raises(ValueError, match=r"convert them first: stablefield data convert .*x\.npy STORE --set"):
        open_samples(tmp_path / "x.npy")
