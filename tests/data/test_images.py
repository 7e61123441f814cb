"""Image files are decoded to their pixels with the right labels, or refused by name."""

import json
import os
import zipfile

import numpy as np
import pytest
from data_files import edm_files, make_folder, make_zip, noise, png
from PIL import Image

from stablefield.data import CelebA, Images
from stablefield.data.decode import Preprocessing, _largest_window

pytestmark = pytest.mark.usefixtures("unchecked", "cache")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STABLEFIELD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pixels(source) -> np.ndarray:
    return source.load().data.numpy()


def one(tmp_path, content: bytes, name: str = "a.png", **options) -> np.ndarray:
    return pixels(Images(make_folder(tmp_path / "one", {name: content}), **options))[0]


@pytest.mark.parametrize("make", [make_zip, make_folder])
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 8, 8), (3, 6, 10), (1, 5, 3)])
def test_images_and_labels_in_edms_layout_are_read_exactly(make, shape, tmp_path):
    images, labels = noise(9, *shape), [3, 1, 0, 2, 2, 1, 0, 0, 1]
    pool = Images(make(tmp_path / "x.zip", edm_files(images, labels))).load()
    assert np.array_equal(pool.data.numpy(), images)
    assert pool.labels.tolist() == labels


def test_labels_are_assigned_by_name_and_not_by_position(tmp_path):
    files = edm_files(noise(5, 1, 4, 4), [4, 3, 2, 1, 0])
    files["dataset.json"] = json.dumps({"labels": json.loads(files["dataset.json"])["labels"][::-1]}).encode()
    assert Images(make_zip(tmp_path / "x.zip", files)).load().labels.tolist() == [4, 3, 2, 1, 0]


def test_one_hot_labels_are_classes_and_null_means_no_labels(tmp_path):
    images = noise(3, 1, 4, 4)
    one_hot = np.eye(3)[[2, 0, 1]].tolist()
    assert Images(make_zip(tmp_path / "a.zip", edm_files(images, one_hot))).load().labels.tolist() == [2, 0, 1]
    assert Images(make_zip(tmp_path / "b.zip", edm_files(images, None))).load().labels is None


@pytest.mark.parametrize("labels", [[[0.5, 0.2], [1.0, 0.1], [0, 1]], [0.5, 1, 2], [-1, 0, 1], [[0, 1], [1], [1]]])
def test_labels_that_are_not_classes_are_refused_or_ignored_on_request(labels, tmp_path):
    path = make_zip(tmp_path / "x.zip", edm_files(noise(3, 1, 4, 4), labels))
    with pytest.raises(ValueError, match=r"labels in .*x\.zip are"):
        Images(path).load()
    assert Images(path, labels=False).load().labels is None


def test_every_image_needs_a_label_and_every_label_an_image(tmp_path):
    files = edm_files(noise(3, 1, 4, 4), [0, 1, 2])
    less = {name: content for name, content in files.items() if "0002" not in name}
    with pytest.raises(ValueError, match=r"has a label for: 00000/img00000002.png .*does not exist"):
        Images(make_zip(tmp_path / "less.zip", less)).load()
    with pytest.raises(ValueError, match=r"no label for: 00000/more.png"):
        Images(make_zip(tmp_path / "more.zip", files | {"00000/more.png": png(noise(1, 4, 4))})).load()
    with pytest.raises(ValueError, match=r"dataset.json in .* is not JSON"):
        Images(make_zip(tmp_path / "odd.zip", files | {"dataset.json": b"[1, 2"})).load()


def test_top_folders_are_classes_in_alphabetical_order(tmp_path):
    names = ["dog/1.png", "cat/x/2.png", "ant/9.png", "dog/0.png"]
    images = noise(4, 3, 4, 4)
    files = dict(zip(names, map(png, images), strict=True))
    for path in (make_folder(tmp_path / "all", files), make_zip(tmp_path / "all.zip", files)):
        pool = Images(path).load()
        assert pool.labels.tolist() == [0, 1, 2, 2]
        assert np.array_equal(pool.data.numpy(), images[[2, 1, 3, 0]])
        assert Images(path).contents().classes == ("ant", "cat", "dog")


def test_a_single_outer_folder_and_hidden_files_are_ignored(tmp_path):
    files = {"photos/b/1.png": png(noise(1, 4, 4)), "photos/a/1.png": png(noise(1, 4, 4, seed=1))}
    hidden = {"__MACOSX/photos/b/._1.png": b"?", ".DS_Store": b"?", "photos/a/.thumb.png": b"?", "LICENSE.txt": b"?"}
    pool = Images(make_zip(tmp_path / "x.zip", files | hidden)).load()
    assert pool.labels.tolist() == [0, 1]
    assert Images(make_folder(tmp_path / "flat", {"x.png": png(noise(1, 4, 4))})).load().labels is None


def test_folders_of_edms_layout_are_not_classes(tmp_path):
    files = edm_files(noise(9, 1, 4, 4), None)
    del files["dataset.json"]
    assert Images(make_zip(tmp_path / "x.zip", files)).load().labels is None


def test_images_beside_class_folders_are_refused_or_read_without_labels(tmp_path):
    path = make_folder(tmp_path / "x", {"a/1.png": png(noise(1, 4, 4)), "stray.png": png(noise(1, 4, 4))})
    with pytest.raises(ValueError, match=r"stray\.png"):
        Images(path).load()
    assert len(Images(path, labels=False).load()) == 2


def test_images_of_different_sizes_are_refused_with_both_names_and_sizes(tmp_path):
    path = make_folder(tmp_path / "x", {"a.png": png(noise(3, 4, 6)), "b.png": png(noise(3, 5, 6))})
    with pytest.raises(ValueError, match=r"a\.png is 6x4 in colour, but b\.png is 6x5 .*--resolution"):
        Images(path).load()
    assert pixels(Images(path, resolution="4x4")).shape == (2, 3, 4, 4)


def test_grey_and_colour_images_together_are_refused_unless_a_mode_is_set(tmp_path):
    grey, colour = noise(1, 4, 4), noise(3, 4, 4)
    path = make_folder(tmp_path / "x", {"a.png": png(grey), "b.png": png(colour)})
    with pytest.raises(ValueError, match=r"a\.png is 4x4 in grey, but b\.png is 4x4 in colour; .*--mode"):
        Images(path).load()
    assert np.array_equal(pixels(Images(path, mode="rgb")), np.stack([grey.repeat(3, 0), colour]))
    luma = np.asarray(Image.fromarray(colour.transpose(1, 2, 0)).convert("L"))
    assert np.array_equal(pixels(Images(path, mode="grey")), np.stack([grey, luma[None]]))


def test_16_bit_images_keep_their_high_byte(tmp_path):
    deep = np.random.default_rng(0).integers(0, 2**16, (6, 5), dtype=np.uint16)
    assert np.array_equal(one(tmp_path, png(deep))[0], deep // 256)
    shallow = noise(6, 5)
    assert np.array_equal(one(tmp_path, png(shallow.astype(np.uint16) * 257))[0], shallow)


def test_palettes_become_rgb_and_one_bit_becomes_black_and_white(tmp_path):
    picture = Image.fromarray(noise(3, 6, 5).transpose(1, 2, 0)).quantize(16)
    picture.save(tmp_path / "p.png")
    expected = np.asarray(picture.convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(one(tmp_path, (tmp_path / "p.png").read_bytes()), expected)
    bits = noise(6, 5) > 127
    assert np.array_equal(one(tmp_path, png(bits))[0], bits * 255)


def over(image: np.ndarray, alpha: np.ndarray, background: int) -> np.ndarray:
    """An image (C, H, W) with opacity alpha (H, W) on a background."""
    return (image * (alpha / 255.0) + background * (1 - alpha / 255.0)).round()


@pytest.mark.parametrize("channels", [2, 4])
@pytest.mark.parametrize(("background", "value"), [("white", 255), ("#000000", 0), ("black", 0)])
def test_transparency_is_composited_on_the_background_or_dropped(channels, background, value, tmp_path):
    image = noise(channels, 6, 5)
    found = one(tmp_path, png(image), background=background)
    assert found.shape == (channels - 1, 6, 5)
    assert np.abs(found - over(image[:-1], image[-1], value)).max() <= 1
    assert np.array_equal(one(tmp_path, png(image), drop_alpha=True), image[:-1])


def test_a_palette_with_transparency_is_composited_or_dropped(tmp_path):
    picture = Image.fromarray(noise(3, 6, 5).transpose(1, 2, 0)).quantize(16)
    alpha = np.arange(16, dtype=np.uint8) * 17
    picture.save(tmp_path / "p.png", transparency=alpha.tobytes())
    content, colours = (tmp_path / "p.png").read_bytes(), np.asarray(picture.convert("RGB")).transpose(2, 0, 1)
    assert np.abs(one(tmp_path, content) - over(colours, alpha[np.asarray(picture)], 255)).max() <= 1
    assert np.array_equal(one(tmp_path, content, drop_alpha=True), colours)


def test_a_coloured_background_makes_grey_images_coloured(tmp_path):
    image = np.stack([noise(6, 5), np.zeros((6, 5), np.uint8)])
    assert one(tmp_path, png(image), background="#ff8000")[:, 0, 0].tolist() == [255, 128, 0]
    with pytest.raises(ValueError, match="name of a colour or #rrggbb"):
        Images(tmp_path, background="url(x)")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_that_a_camera_noted_is_applied(form, orientation, tmp_path):
    image = Image.fromarray(np.kron(noise(2, 4), np.ones((8, 8), np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a", form, exif=exif)
    x = np.asarray(image).astype(int)
    upright = [x, x[:, ::-1], x[::-1, ::-1], x[::-1], x.T, x.T[:, ::-1], x.T[::-1, ::-1], x.T[::-1]][orientation - 1]
    found = one(tmp_path, (tmp_path / "a").read_bytes(), "a.png", mode="grey")[0]
    assert found.shape == upright.shape
    assert np.abs(found - upright).max() <= {"JPEG": 3, "WEBP": 40}.get(form, 0)


def test_floating_pixels_and_several_frames_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"f\.tif .*'F'.*\.npy"):
        one(tmp_path / "1", png(np.zeros((4, 4), np.float32), "TIFF"), "f.tif")
    frames = [Image.fromarray(noise(4, 4, seed=seed)) for seed in range(3)]
    frames[0].save(tmp_path / "g.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match=r"g\.gif .*several frames"):
        one(tmp_path / "2", (tmp_path / "g.gif").read_bytes(), "g.gif")


def central(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """The central window of an image."""
    left, top = (image.shape[2] - width) // 2, (image.shape[1] - height) // 2
    return image[:, top : top + height, left : left + width]


def resized(image: np.ndarray, width: int, height: int) -> np.ndarray:
    bands = [Image.fromarray(band).resize((width, height), Image.Resampling.LANCZOS) for band in image]
    return np.stack([np.asarray(band) for band in bands])


@pytest.mark.parametrize(("height", "width"), [(9, 14), (14, 9), (11, 8), (8, 8)])
def test_center_crop_is_the_largest_central_square_resized(height, width, tmp_path):
    image, side = noise(3, height, width), min(height, width)
    found = one(tmp_path, png(image), resolution="6x6", transform="center-crop")
    assert np.array_equal(found, resized(central(image, side, side), 6, 6))
    unscaled = one(tmp_path, png(image), resolution=f"{side}x{side}", transform="center-crop")
    assert np.array_equal(unscaled, central(image, side, side))


def test_center_crop_wide_pads_with_black_bars_to_a_square(tmp_path):
    image = noise(3, 12, 18)
    found = one(tmp_path, png(image), resolution="8x6", transform="center-crop-wide")
    assert found.shape == (3, 8, 8)
    assert not found[:, [0, 7]].any()
    assert np.array_equal(found[:, 1:7], resized(central(image, 16, 12), 8, 6))


def test_a_resolution_without_a_transform_stretches(tmp_path):
    image = noise(3, 12, 18)
    assert np.array_equal(one(tmp_path, png(image), resolution="5x7"), resized(image, 5, 7))


@pytest.mark.parametrize("size", [(7, 31), (100, 3), (178, 218), (1, 1)])
@pytest.mark.parametrize("proportions", [(1, 1), (4, 3), (1, 5)])
def test_the_largest_window_fits_and_touches_the_borders(size, proportions):
    width, height = _largest_window(size, proportions)
    assert width <= size[0]
    assert height <= size[1]
    assert width == size[0] or height == size[1]


def test_celeba_is_cropped_to_140x140_and_resized_to_64x64(tmp_path):
    image = noise(3, 218, 178)
    path = make_folder(tmp_path / "img_align_celeba", {"000001.png": png(image)})
    assert np.array_equal(pixels(CelebA(path))[0], resized(image[:, 39:179, 19:159], 64, 64))
    small = make_folder(tmp_path / "small", {"000001.png": png(noise(3, 100, 178))})
    with pytest.raises(ValueError, match="178x100, too small for a crop of 140x140"):
        CelebA(small).load()


def test_max_images_reads_only_the_first_images(tmp_path):
    images = noise(6, 1, 4, 4)
    files = edm_files(images, range(6)) | {"00001/img00000005.png": b"damaged"}
    pool = Images(make_zip(tmp_path / "x.zip", files), max_images=4).load()
    assert np.array_equal(pool.data.numpy(), images[:4])
    assert pool.labels.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("make", [make_zip, make_folder])
def test_a_damaged_image_is_refused_by_name(make, tmp_path):
    files = edm_files(noise(6, 3, 16, 16), None)
    for content in (files["00000/img00000003.png"][:200], b"not an image", b""):
        path = make(tmp_path / f"{len(content)}.zip", files | {"00000/img00000003.png": content})
        with pytest.raises(ValueError, match=r"00000/img00000003\.png .*cannot be decoded"):
            Images(path).load()


def test_a_damaged_zip_file_is_refused_with_the_name_of_the_image(tmp_path):
    path = make_zip(tmp_path / "x.zip", edm_files(noise(6, 3, 16, 16), None))
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("00001/img00000004.png").header_offset + 120
    path.write_bytes(content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :])
    with pytest.raises(ValueError, match=r"00001/img00000004\.png in .*x\.zip cannot be read"):
        Images(path).load()
    path.write_bytes(content[:-40])
    with pytest.raises(ValueError, match=r"x\.zip is not a ZIP file, or was cut short"):
        Images(path).load()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": "64"}, "WIDTHxHEIGHT.*'64'"),
        ({"resolution": "0x4"}, "WIDTHxHEIGHT"),
        ({"transform": "center-crop"}, "requires a resolution"),
        ({"transform": "center-crop-wide", "resolution": "4x8"}, "wider than high, not 4x8"),
        ({"max_images": 0}, "at least 1, not 0"),
    ],
)
def test_invalid_options_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Images(tmp_path, **options)


def test_paths_without_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there are no images \(\.png, .*\) in"):
        Images(make_folder(tmp_path / "x", {"a.txt": b"?"})).load()
    with pytest.raises(ValueError, match="there is no file or folder"):
        Images(tmp_path / "nowhere").load()


def test_images_are_decoded_once_and_again_when_a_file_changes(tmp_path, cache, monkeypatch):
    files = edm_files(noise(3, 1, 8, 8), [0, 1, 2])
    folder, archive = make_folder(tmp_path / "x", files), make_zip(tmp_path / "x.zip", files)
    first = pixels(Images(folder)), pixels(Images(archive))
    with monkeypatch.context() as patch:
        patch.setattr(Preprocessing, "__call__", None)  # decoding would fail
        again = pixels(Images(folder)), pixels(Images(archive))
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    other = noise(1, 8, 8, seed=9)
    before = (folder / "00000/img00000001.png").stat()
    changed = files | {"00000/img00000001.png": png(other)}
    make_folder(folder, changed)
    os.utime(folder / "00000/img00000001.png", ns=(before.st_atime_ns, before.st_mtime_ns))  # as copying tools do
    make_zip(archive, changed)
    assert np.array_equal(pixels(Images(folder))[1], other)
    assert np.array_equal(pixels(Images(archive))[1], other)
    assert pixels(Images(archive, resolution="4x4")).shape == (3, 1, 4, 4)


def test_images_are_decoded_again_when_a_label_changes(tmp_path):
    images = noise(3, 1, 8, 8)
    assert Images(make_zip(tmp_path / "x.zip", edm_files(images, [0, 1, 2]))).load().labels.tolist() == [0, 1, 2]
    assert Images(make_zip(tmp_path / "x.zip", edm_files(images, [0, 2, 1]))).load().labels.tolist() == [0, 2, 1]


def test_a_renamed_zip_file_is_not_decoded_again(tmp_path, cache):
    path = make_zip(tmp_path / "x.zip", edm_files(noise(3, 1, 8, 8), None))
    Images(path).load()
    Images(path.rename(tmp_path / "y.zip")).load()
    assert len([place for place in cache.iterdir() if place.is_dir()]) == 1


@pytest.mark.parametrize("form", ["JPEG", "BMP", "WEBP", "TIFF"])
def test_other_image_formats_are_decoded_as_by_pillow(form, tmp_path):
    content = png(noise(3, 8, 8), form)
    (tmp_path / "a").write_bytes(content)
    expected = np.asarray(Image.open(tmp_path / "a").convert("RGB")).transpose(2, 0, 1)
    name = {"JPEG": "A.JPG", "BMP": "a.bmp", "WEBP": "a.webp", "TIFF": "a.tiff"}[form]
    assert np.array_equal(one(tmp_path, content, name), expected)
