"""Data at the command line: convert them to every format, inspect them, train on them."""

import json
import re
import shlex
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import cifar_files, edm_files, make_folder, make_mnist, make_tar, make_zip, noise, png
from PIL import Image
from typer.testing import CliRunner

from stablefield.checkpoint import read as read_checkpoint
from stablefield.cli import app
from stablefield.config import resolve
from stablefield.data import Arrays, Contents, Images, Source, Store, content_hash, guess_kind
from stablefield.pool import Pool

pytestmark = pytest.mark.usefixtures("unchecked", "cache")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STABLEFIELD_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def command(*arguments: object):
    """Result of a command that is run in this process; an error is its exception."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def convert(*arguments: object) -> str:
    result = command("data", "convert", *arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


def read(dest) -> Source:
    return {".zip": Images, ".npz": Arrays}.get(dest.suffix, Store)(dest)


def make(kind: str, folder) -> object:
    """Path of a source of each kind with six data points."""
    images, labels = noise(6, 3, 8, 8), [0, 2, 1, 1, 0, 2]
    if kind == "arrays":
        np.savez(folder / "x.npz", data=images, labels=np.array(labels))
        return folder / "x.npz"
    if kind == "idx":
        return make_mnist(folder / "mnist", images[:, 0], np.array(labels, np.uint8))
    if kind == "cifar":
        return make_tar(folder / "cifar-10-python.tar.gz", cifar_files(noise(6, 3, 32, 32), labels))
    if kind == "celeba":
        return make_folder(folder / "img_align_celeba", {f"{n}.png": png(noise(3, 218, 178)) for n in range(6)})
    if kind == "folder":
        classes = {
            f"{'abc'[label]}/{n}.png": png(image) for n, (image, label) in enumerate(zip(images, labels, strict=True))
        }
        return make_folder(folder / "photos", classes)
    return make_zip(folder / "edm.zip", edm_files(images, labels))


@pytest.mark.parametrize("dest", ["store", "again.zip", "again.npz"])
@pytest.mark.parametrize("kind", ["arrays", "idx", "cifar", "celeba", "folder", "zip"])
def test_every_source_keeps_pixels_labels_and_hash_in_every_format(kind, dest, tmp_path):
    source = make(kind, tmp_path)
    output = convert(source, dest)
    assert f"kind      { {'folder': 'images', 'zip': 'images'}.get(kind, kind) } (guessed" in output
    guessed, path = guess_kind(str(source))
    direct = resolve({"data": {"kind": guessed, "path": path}}).make("data")
    before, after = direct.load(), read(tmp_path / dest).load()
    assert np.array_equal(before.data.numpy(), after.data.numpy())
    assert (before.labels is None and after.labels is None) or before.labels.tolist() == after.labels.tolist()
    assert content_hash(before) == content_hash(after)
    assert read(tmp_path / dest).contents().classes == direct.contents().classes


def test_data_survive_a_conversion_through_all_formats(tmp_path):
    convert(make("folder", tmp_path), "a")
    for source, dest in (("a", "b.zip"), ("b.zip", "c.npz"), ("c.npz", "d")):
        convert(source, dest)
    first, last = Store(tmp_path / "a"), Store(tmp_path / "d")
    assert first.verify() == last.verify()
    assert first.metadata()["classes"] == last.metadata()["classes"] == ["a", "b", "c"]


def test_a_zip_file_has_edms_layout_and_equal_data_give_equal_bytes(tmp_path):
    images = noise(1002, 1, 2, 2)
    np.savez("x.npz", data=images, labels=np.arange(1002) % 7)
    convert("x.npz", "a.zip")
    convert("x.npz", "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile("a.zip") as archive:
        labels = json.loads(archive.read("dataset.json"))["labels"]
        assert labels[1001] == ["00001/img00001001.png", 0]
        assert sorted(archive.namelist()) == sorted([*(name for name, _ in labels), "dataset.json"])
        with archive.open("00001/img00001001.png") as file:
            assert np.array_equal(np.asarray(Image.open(file)), images[1001, 0])
    np.savez("y.npz", data=images[:2])
    convert("y.npz", "y.zip")
    with zipfile.ZipFile("y.zip") as archive:
        assert json.loads(archive.read("dataset.json")) == {"labels": None}


@pytest.mark.parametrize("shape", [(5, 2), (5, 1, 7), (5, 1, 3, 4, 5), (5, 4, 6, 6), (5, 1, 6, 6), (5, 3, 6, 6)])
def test_vectors_signals_volumes_latents_and_fields_survive_a_store(shape, tmp_path):
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    np.save("x.npy", values)
    convert("x.npy", "store")
    convert("store", "back.npz")
    assert np.array_equal(Store(tmp_path / "store").load().data.numpy(), values)
    assert np.array_equal(Arrays(tmp_path / "back.npz").load().data.numpy(), values)
    result = command("data", "convert", "x.npy", "x.zip")
    assert "a ZIP file can only contain images in bytes with 1 or 3 channels, not float32" in str(result.exception)
    assert not (tmp_path / "x.zip").exists()


def test_bytes_declared_as_floats_are_refused_in_a_zip_file(tmp_path):
    np.save("x.npy", noise(5, 3, 6, 6))
    result = command("data", "convert", "x.npy", "x.zip", "--set", "data.values=float")
    assert "a ZIP file can only contain images, not bytes (3, 6, 6) with values=float" in str(result.exception)
    assert not (tmp_path / "x.zip").exists()


def test_num_levels_of_the_digits_are_kept_or_the_format_is_refused(tmp_path):
    convert("digits", "digits-store")
    convert("digits-store", "digits.npz")
    assert Store(tmp_path / "digits-store").load().num_levels == Arrays(tmp_path / "digits.npz").load().num_levels == 17
    assert "256 levels, not 17" in str(command("data", "convert", "digits", "digits.zip").exception)


def test_options_set_the_keys_of_the_kind(tmp_path):
    source = make_folder(tmp_path / "x", {f"{n}.png": png(noise(4, 9, 12 + n)) for n in range(5)})
    options = (
        "--resolution",
        "4x4",
        "--transform",
        "center-crop",
        "--drop-alpha",
        "--max-images",
        "3",
        "--mode",
        "grey",
    )
    convert(source, "small", *options)
    assert Store(tmp_path / "small").load().data.shape == (3, 1, 4, 4)
    convert(make("cifar", tmp_path), "test", "--set", "data.split=test", "--no-labels")
    assert len(Store(tmp_path / "test").load()) == 1
    assert Store(tmp_path / "test").load().labels is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "x"), "no file or folder nowhere"),
        (("x.npy", "y", "--resolution", "4x4"), "data.resolution: 'arrays' has no such key"),
        (("x.npy", "y", "--kind", "image"), "data.kind: 'image' is none of .*did you mean images"),
        (("x.npy", "taken"), "taken exists already"),
        (("photos", "y", "--transform", "crop"), "data.transform: .*center-crop"),
        (("photos", "y", "--set", "training.seed=1"), "only keys of the section data can be set here"),
        (("x.bin", "y"), "cannot guess the kind of x.bin"),
        (("x.npy", "y.npy"), r"y\.npy: data are written to a \.zip file, an \.npz file or a folder"),
        (("x.npy", "y.H5"), r"y\.H5: data are written to"),
        (("photos", "y.png"), r"y\.png: data are written to"),
    ],
)
def test_mistakes_are_explained(arguments, message, tmp_path):
    np.save("x.npy", noise(3, 2))
    make_folder(tmp_path, {"taken/precious": b"", "x.bin": b"", "photos/a.png": png(noise(1, 4, 4))})
    result = command("data", "convert", *arguments)
    assert result.exit_code != 0
    with pytest.raises(Exception, match=message):
        raise result.exception
    assert not list(tmp_path.glob("y*"))


@pytest.mark.parametrize("option", ["--sheet", "--plot"])
def test_images_of_an_inspection_have_a_suffix_that_says_so(option, tmp_path):
    np.save("x.npy", noise(9, 1, 4, 4))
    with pytest.raises(ValueError, match=rf"{option} sheet\.xyz: the file must end in \.png"):
        raise command("data", "inspect", "x.npy", option, "sheet.xyz").exception
    assert not (tmp_path / "sheet.xyz").exists()


def test_suffixes_are_known_in_capitals_too(tmp_path):
    np.save("x.npy", noise(9, 1, 4, 4))
    for name in ("y.ZIP", "y.NPZ"):
        convert("x.npy", name)
        assert zipfile.is_zipfile(name)


def test_inspect_prints_shape_moments_classes_and_hash_and_saves_a_sheet(tmp_path):
    source = make("folder", tmp_path)
    pool = Images(source).load()
    result = command("data", "inspect", source, "--sheet", "images.png")
    x = pool.data.numpy() / 127.5 - 1
    for part in (
        "6 of shape (3, 8, 8), uint8",
        f"mean {x.mean():.4f}, standard deviation {x.std():.4f}",
        f"preconditioning.sigma_data={x.std():.2g}",
        "classes   3",
        "2  b",
        content_hash(pool),
    ):
        assert part in result.output
    sheet = np.asarray(Image.open("images.png"))
    factor, first = 6, pool.data[0].numpy().transpose(1, 2, 0)
    assert np.array_equal(sheet[1 : 1 + 8 * factor : factor, 1 : 1 + 8 * factor : factor], first)


def test_inspect_verifies_a_store_and_saves_no_sheet_of_vectors(tmp_path):
    np.save("x.npy", np.random.default_rng(0).normal(3, 2, size=(500, 4)))
    convert("x.npy", "store")
    result = command("data", "inspect", "store")
    assert "(verified)" in result.output
    assert "classes   none" in result.output
    assert not (tmp_path / "sheet.png").exists()
    content = (tmp_path / "store" / "data.npy").read_bytes()
    (tmp_path / "store" / "data.npy").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "is damaged" in str(command("data", "inspect", "store").exception)


def test_inspect_saves_a_sheet_of_floats_only_if_they_are_declared_images(tmp_path):
    x = np.random.default_rng(0).standard_normal((20, 1, 6, 6)).astype(np.float32)
    np.save("fields.npy", x)
    np.save("images.npy", np.tanh(x))
    for name in ("fields", "images"):
        result = command("data", "inspect", f"{name}.npy", "--no-noise")
        assert "(1, 6, 6), float32, values=float" in result.output
        refused = command("data", "inspect", f"{name}.npy", "--no-noise", "--sheet", "sheet.png")
        assert "--sheet is for images" in str(refused.exception)
        assert not (tmp_path / "sheet.png").exists()
    refused = command("data", "inspect", "fields.npy", "--no-noise", "--set", "data.values=image")
    assert f"these are {x.min():.4g} to {x.max():.4g}" in str(refused.exception)
    convert("images.npy", "store", "--set", "data.values=image")
    assert "values=image" in command("data", "inspect", "store", "--no-noise", "--sheet", "sheet.png").output
    assert (tmp_path / "sheet.png").exists()


@pytest.mark.parametrize("kind", ["arrays", "idx", "cifar", "celeba", "folder", "zip"])
def test_every_source_can_be_trained_on_directly(kind, tmp_path):
    guessed, path = guess_kind(str(make(kind, tmp_path)))
    sets = [f"data.kind={guessed}", f"data.path={path}", "target.size=4", "network.channels=8"]
    result = command("train", "--dry-run", *(part for setting in sets for part in ("--set", setting)))
    assert result.exit_code == 0, result.exception
    assert "Pool((6, " in result.output


def test_training_on_a_store_a_zip_file_and_an_array_is_equal_bit_for_bit(tmp_path):
    np.save("x.npy", noise(64, 1, 8, 8))
    convert("x.npy", "x")
    convert("x.npy", "x.zip")
    quick = [
        "training.images=128",
        "training.learning_rate_warmup=0",
        "target.size=16",
        "network.channels=8",
        "network.blocks=1",
    ]
    checkpoints = []
    for kind, path in (("arrays", "x.npy"), ("store", "x"), ("images", "x.zip")):
        sets = [*quick, f"data.kind={kind}", f"data.path={path}"]
        result = command("train", "--out", f"run-{kind}", *(part for setting in sets for part in ("--set", setting)))
        assert result.exit_code == 0, result.exception
        checkpoints.append(tmp_path / f"run-{kind}" / "checkpoint.safetensors")
    tensors = [read_checkpoint(file).tensors for file in checkpoints]
    for other in tensors[1:]:
        assert all((other[name] == tensor).all() for name, tensor in tensors[0].items())


def test_the_contents_of_a_pool_are_its_data():
    pool = Pool(torch.from_numpy(noise(300, 2)))
    assert np.array_equal(np.concatenate(list(Contents.from_pool(pool).blocks())), pool.data.numpy())


def test_the_commands_and_code_of_the_page_on_data_run(tmp_path):
    images, labels = noise(12, 3, 32, 32), [number % 10 for number in range(12)]
    make_zip(tmp_path / "cifar10-32x32.zip", edm_files(images, labels))
    make_tar(tmp_path / "cifar-10-python.tar.gz", cifar_files(images, labels))
    make_mnist(tmp_path / "mnist", images[:, 0], np.array(labels, np.uint8))
    make("celeba", tmp_path)
    make("folder", tmp_path)
    np.save("latents.npy", np.zeros((12, 4, 8, 8), np.float32))
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    lines = [line for block in re.findall(r"```console\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    assert len(lines) >= 10
    for line in lines:
        if "hf:" not in line:  # tests do not access the hub
            sets = ["--set", "target.size=8"] if " train " in line else []
            result = command(*shlex.split(line.replace("holdout=500", "holdout=3"))[1:], *sets)
            assert result.exit_code == 0, (line, result.output, result.exception)
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(code, "data.md", "exec"), {"__name__": "page"})
