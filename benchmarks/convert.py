"""Time of `data convert` for JPEG files, against one process that decodes, crops, resizes and writes a stored ZIP file.

    python benchmarks/convert.py [--images 8000] [--runs 3]

The peer is EDM's way, written anew: each image is decoded, cropped to its central square, resized with Lanczos and
written as PNG with compress_level 0 into a ZIP file that is not compressed. Both are timed as processes, start-up
included, in alternating runs; the ratio is the peer's shortest time over ours, and above 1 ours is faster.
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["main", "peer"]


def peer(source: Path, dest: Path, side: int = 64) -> None:
    """Convert a folder of images to a ZIP file, one after the other.

    Args:
        source: the folder.
        dest: the ZIP file.
        side: side of the resized images.
    """
    labels = []
    with zipfile.ZipFile(dest, "w") as archive:
        for number, path in enumerate(sorted(source.rglob("*.jpg"))):
            image = Image.open(path).convert("RGB")
            width, height = image.size
            square = min(width, height)
            left, top = (width - square) // 2, (height - square) // 2
            image = image.crop((left, top, left + square, top + square))
            file = io.BytesIO()
            image.resize((side, side), Image.Resampling.LANCZOS).save(file, "PNG", compress_level=0)
            name = f"{number // 1000:05d}/img{number:08d}.png"
            archive.writestr(name, file.getvalue())
            labels.append([name, 0])
        archive.writestr("dataset.json", json.dumps({"labels": labels}))


def main() -> None:
    """Write the images, time all ways in alternating runs, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8000, help="number of JPEG files")
    parser.add_argument("--size", type=int, default=256, help="their shorter side")
    parser.add_argument("--runs", type=int, default=3, help="alternating runs of each way")
    parser.add_argument("--peer", nargs=2, type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peer:
        peer(*given.peer)
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        _write_images(place / "photos", given.images, given.size)
        convert = [sys.executable, "-m", "stablefield", "data", "convert", "photos"]
        options = ["--resolution", "64x64", "--transform", "center-crop"]
        ways = {
            "peer": [sys.executable, str(Path(__file__).resolve()), "--peer", "photos", "peer.zip"],
            "zip": [*convert, "zip.zip", *options],
            "store": [*convert, "store", *options],
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(given.runs):
            for name, command in ways.items():
                times[name].append(_seconds(command, place))
        for name, seconds in times.items():
            ratio = min(times["peer"]) / min(seconds)
            runs = ", ".join(f"{value:.1f}" for value in seconds)
            print(f"{name:6} {min(seconds):6.1f} s   ratio {ratio:.2f}   (runs: {runs})")


def _write_images(folder: Path, count: int, size: int) -> None:
    """Smooth random images with noise, as JPEG files."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((size * 4 // 3, size), Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(pixels + generator.integers(-9, 10, pixels.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number:06d}.jpg", quality=90)


def _seconds(command: list[str], folder: Path) -> float:
    for made in ("peer.zip", "zip.zip"):
        (folder / made).unlink(missing_ok=True)
    shutil.rmtree(folder / "store", ignore_errors=True)
    environment = {**os.environ, "STABLEFIELD_CACHE": str(folder / "cache")}
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, capture_output=True, env=environment)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
