"""Folders and ZIP files: each image once, under any name, and nothing passed over or changed without a word."""

import json
import logging
import os
import unicodedata
import zipfile

import numpy as np
import pytest
from data_files import edm_files, make_folder, make_zip, noise, png
from PIL import Image

from stablefield.data import Images, printable, say
from stablefield.data.decode import SUFFIXES
from stablefield.data.labels import class_labels, number_classes

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("STABLEFIELD_CACHE", str(tmp_path / "cache"))
    say.cache_clear()


@pytest.fixture
def notes(caplog):
    caplog.set_level(logging.WARNING, "stablefield")
    return lambda: [record.getMessage() for record in caplog.records]


def images(count: int = 3, names: str = "{}.png") -> dict[str, bytes]:
    return {names.format(n): png(noise(3, 8, 8, seed=n)) for n in range(count)}


def zip_with(path, *files: tuple[str, bytes]):
    """ZIP file with names exactly as they are given."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files:
            entry = zipfile.ZipInfo("x")
            entry.filename = name
            archive.writestr(entry, content)
    return path


@pytest.mark.parametrize("target", [".", "..", "a", "a/.."])
def test_a_link_to_a_folder_that_is_there_or_around_it_adds_nothing(target, tmp_path, notes):
    folder = make_folder(tmp_path / "x", images(3, "a/{}.png") | images(2, "b/{}.png"))
    make_folder(tmp_path, {"beside.png": png(noise(3, 8, 8))})
    (folder / "latest").symlink_to(target)
    pool = Images(folder).load()
    assert pool.labels.tolist() == [0, 0, 0, 1, 1]
    assert any("passed over links to files that are there already: latest (1)" in note for note in notes())


def test_links_to_files_and_folders_elsewhere_are_followed_once(tmp_path, notes):
    outside = make_folder(tmp_path / "outside", images(3))
    folder = make_folder(tmp_path / "x", {"a/0.png": png(noise(3, 8, 8, seed=9))})
    (folder / "b").symlink_to(outside)
    (folder / "c").symlink_to(outside)
    (folder / "a" / "again.png").symlink_to(folder / "a" / "0.png")
    os.link(folder / "a" / "0.png", folder / "a" / "hard.png")
    (folder / "a" / "broken.png").symlink_to("nowhere")
    assert Images(folder).load().labels.tolist() == [0, 1, 1, 1]
    assert any("already: a/hard.png, a/again.png, c (3)" in note for note in notes())
    assert any("broken links and files that are not regular: a/broken.png (1)" in note for note in notes())


def test_a_pipe_in_a_folder_is_passed_over_and_not_waited_for(tmp_path, notes):
    folder = make_folder(tmp_path / "x", images(2))
    os.mkfifo(folder / "z.png")
    assert len(Images(folder).load()) == 2
    assert any("not regular: z.png" in note for note in notes())


def test_every_suffix_of_a_known_format_is_read_and_the_others_are_counted(tmp_path, notes):
    folder = make_folder(tmp_path / "x", {"notes.txt": b"?", "a.HEIC": b"?", "b.txt": b"?", ".hidden": b"?"})
    for number, (suffix, form) in enumerate(
        [("png", "PNG"), ("jfif", "JPEG"), ("TGA", "TGA"), ("jp2", "JPEG2000"), ("jpe", "JPEG"), ("apng", "PNG")]
    ):
        Image.fromarray(noise(8, 8, 3)).save(folder / f"{number}.{suffix}", form)
    assert len(Images(folder).load()) == 6
    assert any("passed over 3 files that are not images by their names (2 .txt, 1 .heic)" in note for note in notes())
    assert ".eps" not in SUFFIXES  # Pillow starts another program for these


def test_no_format_that_runs_another_program_is_opened(tmp_path):
    with pytest.raises(ValueError, match=r"a\.png .*cannot be decoded"):
        Images(make_folder(tmp_path / "x", {"a.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"})).load()


def test_backslashes_in_a_zip_file_separate_folders(tmp_path):
    files = [(f"{name}\\{n}.png", png(noise(3, 8, 8, seed=n))) for name in ("cat", "dog") for n in range(2)]
    source = Images(zip_with(tmp_path / "x.zip", *files))
    assert source.load().labels.tolist() == [0, 0, 1, 1]
    assert source.contents().classes == ("cat", "dog")
    edm = edm_files(noise(6, 3, 8, 8), [0, 1, 0, 1, 1, 0])
    turned = [(name.replace("/", "\\"), content) for name, content in edm.items()]
    assert Images(zip_with(tmp_path / "y.zip", *turned)).load().labels.tolist() == [0, 1, 0, 1, 1, 0]


@pytest.mark.parametrize("make", [make_zip, make_folder])
@pytest.mark.parametrize(("stored", "listed"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_names_with_accents_are_found_however_they_are_written(make, stored, listed, tmp_path):
    def name(n: int, form: str) -> str:
        return unicodedata.normalize(form, f"é/{n}ü.png")

    files = {name(n, stored): png(noise(3, 8, 8, seed=n)) for n in range(3)}
    labels = json.dumps({"labels": [[name(n, listed), n] for n in range(3)]}).encode()
    assert Images(make(tmp_path / "x", files | {"dataset.json": labels})).load().labels.tolist() == [0, 1, 2]


def test_utf8_names_without_their_mark_are_recognised(tmp_path):
    path = zip_with(tmp_path / "x.zip", ("a/0.png", png(noise(3, 8, 8))), ("XX/1.png", png(noise(3, 8, 8, seed=1))))
    path.write_bytes(path.read_bytes().replace(b"XX/1.png", "é/1.png".encode()))
    assert Images(path).contents().classes == ("a", "é")


@pytest.mark.parametrize("other", ["0.png", ".\\0.png"])
def test_two_files_of_one_name_are_refused(other, tmp_path):
    path = zip_with(tmp_path / "x.zip", ("0.png", png(noise(3, 8, 8))), (other, png(noise(3, 8, 8, seed=1))))
    with pytest.raises(ValueError, match=r"x\.zip contains two files of one name: 0\.png"):
        Images(path).load()


def labelled(tmp_path, labels: list, count: int = 3):
    listed = json.dumps({"labels": labels}).encode()
    return Images(make_zip(tmp_path / "x.zip", images(count) | {"dataset.json": listed}))


def test_all_faults_of_labels_are_reported_together(tmp_path):
    source = labelled(tmp_path, [["0.png", 0], ["0.png", 1], ["9.png", 2], ["8.png", 2]])
    with pytest.raises(ValueError, match="dataset") as error:
        source.load()
    message = str(error.value)
    assert "has two labels for: 0.png (1)" in message
    assert "has no label for: 1.png, 2.png (2)" in message
    assert "has a label for: 8.png, 9.png (2), which does not exist" in message
    assert "\n" not in message


def test_a_label_that_is_given_twice_alike_is_one_label(tmp_path):
    assert labelled(tmp_path, [["0.png", 0], ["1.png", 1], ["0.png", 0], ["2.png", 1]]).load().labels.tolist() == [
        0,
        1,
        1,
    ]


@pytest.mark.parametrize("wrong", [-1, 1.5, None, "cat", True, [0, 1, 1], 10**30, {}])
def test_the_message_about_labels_names_a_wrong_one(wrong, tmp_path):
    with pytest.raises(ValueError, match=r"labels in .*x\.zip are") as error:
        labelled(tmp_path, [["0.png", 0], ["1.png", wrong], ["2.png", 1]]).load()
    assert "1.png has the label" in str(error.value) or "different lengths" in str(error.value)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [([1, 2, 3], ("1", "2", "3")), ([0, 5, 9], ("0", "5", "9")), ([3 * 10**11, 7, 7], ("7", "300000000000"))],
)
def test_labels_with_gaps_are_numbered_again_and_kept_as_names(labels, classes, tmp_path, notes):
    source = labelled(tmp_path, [[f"{n}.png", label] for n, label in enumerate(labels)])
    pool = source.load()
    assert [classes[label] for label in pool.labels.tolist()] == list(map(str, labels))
    assert source.contents().classes == classes
    assert sum("are numbered 0 to" in note for note in notes()) == 1


def test_numbering_keeps_names_order_and_labels_without_gaps():
    labels = np.array([2, 0, 1, 2])
    assert number_classes(labels, ("a", "b", "c", "d"), "x") == (labels, ("a", "b", "c", "d"), "")
    found = number_classes(labels[[0, 1]], ("a", "b", "c"), "x")
    assert found.labels.tolist() == [1, 0]
    assert found.names == ("a", "c")
    for kind in (np.uint8, np.int32, np.float64, np.uint64):
        assert class_labels(labels.astype(kind), "x").tolist() == [2, 0, 1, 2]


def test_all_problems_of_a_folder_are_reported_and_can_be_skipped(tmp_path, notes):
    files = images(40) | {f"{n}.png": b"<html>" for n in range(10, 35)}
    files |= {"7.png": images(1)["0.png"][:60], "8.png": png(noise(3, 9, 8))}
    frames = [Image.fromarray(noise(8, 8, seed=n)) for n in range(2)]
    folder = make_folder(tmp_path / "x", files)
    frames[0].save(folder / "9.png", "GIF", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="cannot be used") as error:
        Images(folder).load()
    message = str(error.value)
    assert "28 of the 40 images" in message
    assert len(message.splitlines()) == 1 + 20 + 1 + 1
    assert "and 8 more" in message
    assert "--skip-unreadable" in message
    with pytest.raises(ValueError, match=r"8\.png is 8x9 .*--resolution"):  # readable, but of another size
        Images(folder, skip_unreadable=True).load()
    pool = Images(folder, skip_unreadable=True, resolution="8x8").load()
    assert len(pool) == 13
    assert any("left out 27 images that cannot be read" in note for note in notes())
    assert np.array_equal(pool.data[0].numpy(), noise(3, 8, 8, seed=0))
    assert len(Images(folder, skip_unreadable=True, max_images=3).load()) == 3


def test_skipping_keeps_the_labels_of_the_others(tmp_path):
    files = images(3) | {"1.png": b"?", "dataset.json": b'{"labels": [["0.png", 0], ["1.png", 1], ["2.png", 1]]}'}
    assert Images(make_zip(tmp_path / "x.zip", files), skip_unreadable=True).load().labels.tolist() == [0, 1]
    with pytest.raises(ValueError, match="cannot be decoded"):
        Images(make_folder(tmp_path / "none", {"a.png": b"?"}), skip_unreadable=True).load()


def test_what_was_done_to_images_is_said_again_when_they_come_from_the_cache(tmp_path, notes):
    exif = Image.Exif()
    exif[0x0112] = 3
    turned = png(noise(3, 8, 8), exif=exif)
    folder = make_folder(tmp_path / "x", {"a.png": turned, "b.png": png(noise(4, 8, 8)), "c.png": png(noise(3, 8, 8))})
    for _ in range(2):
        say.cache_clear()
        Images(folder).load()
    for part in ("1 images were turned upright", "1 images with transparency were composited on white"):
        assert sum(part in note for note in notes()) == 2


def test_images_of_16_bits_that_use_few_of_them_are_questioned(tmp_path, notes):
    few = make_folder(tmp_path / "few", {f"{n}.png": png(noise(8, 8, seed=n).astype(np.uint16)) for n in range(3)})
    deep = make_folder(tmp_path / "deep", {"a.png": png(noise(8, 8).astype(np.uint16) * 257)})
    Images(deep).load()
    assert notes() == []
    Images(few).load()
    assert any("3 images of 16 bits use at most 13 of them" in note for note in notes())


def test_text_of_files_is_shown_without_escape_sequences(tmp_path):
    hostile = "\x1b[2J\x1b]0;title\x07\u202e\n\r\x9b1m"
    assert printable(hostile).isprintable()
    assert printable("é 漢字 a.png") == "é 漢字 a.png"
    assert len(printable("x" * 10**6)) < 400
    listed = json.dumps({"labels": [[hostile, 1], ["0.png", hostile]], "classes": [hostile]}).encode()
    folder = make_folder(tmp_path / "x", images(1) | {f"{hostile[:6]}.png": b"?", "dataset.json": listed})
    for options in ({}, {"labels": False}):
        with pytest.raises(ValueError, match=r"x1b|not classes|label") as error:
            Images(folder, **options).load()
        assert all(line.isprintable() for line in str(error.value).split("\n"))
