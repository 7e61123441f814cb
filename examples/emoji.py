"""Emoji in colour on one CPU core: draw them, train by class, sample, and look for copies of training images.

    apt-get install fonts-noto-color-emoji   # Debian's package (SIL Open Font License); --font takes another file
    python examples/emoji.py                 # several hours; the same command resumes a run

The data are the faces, animals and foods of the font, 350 images of 32 x 32 pixels on white. Settings can be changed as
for `stablefield train`, for example with --set training.images=20000. It writes RUN/emoji.png: for each class a row of
samples, and below it the nearest training image of each sample, mirrored ones included.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from stablefield.build import build_sampler
from stablefield.evaluate import find_nearest
from stablefield.generate.images import save_sheet
from stablefield.pool import Pool
from stablefield.run import open_run, training_data

DEBIAN = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
POINTS = 109  # the only size of the bitmaps in this font
SIDE = 32

# first and last code points of each class (Unicode 15)
CLASSES = {
    "animals": "1f400-1f43d 1f43f 1f980-1f9ae 1fab0-1fab3 1fabc-1fabd 1fabf 1face-1facf",
    "faces": "1f600-1f644 1f910-1f917 1f920-1f925 1f927-1f92f 1f970-1f976 1f978-1f97a 1f9d0 1fae0-1fae3 1fae5 1fae8",
    "food": "1f32d-1f330 1f336 1f33d 1f344-1f37f 1f950-1f96f 1f9c0-1f9cb 1fad0-1fadb",
}


def draw(folder: Path, font_file: str) -> None:
    """Draw all emoji of `CLASSES` into FOLDER/CLASS/CODE.png."""
    font = ImageFont.truetype(font_file, POINTS)
    for name, ranges in CLASSES.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for text in ranges.split():
            first, _, last = text.partition("-")
            for code in range(int(first, 16), int(last or first, 16) + 1):
                _draw_one(font, chr(code)).save(folder / name / f"{code:05x}.png")


def _draw_one(font: ImageFont.FreeTypeFont, character: str) -> Image.Image:
    """An emoji on white, scaled so that it fills the image except for a margin of 3 % on each side."""
    canvas = Image.new("RGBA", (240, 240), "white")
    ImageDraw.Draw(canvas).text((120, 120), character, font=font, embedded_color=True, anchor="mm")
    ink = canvas.convert("L").point(lambda value: 255 * (value < 250)).getbbox()
    if ink is None:
        sys.exit(f"the font has no emoji U+{ord(character):X}; choose a newer one with --font")
    left, top, right, bottom = ink
    x, y, half = (left + right) / 2, (top + bottom) / 2, 0.53 * max(right - left, bottom - top)
    box = (x - half, y - half, x + half, y + half)
    return canvas.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS, box=box)


def train(run: Path, data: Path, settings: list[str]) -> None:
    """Start the run with `stablefield train`, or resume it."""
    start = ["--recipe", "emoji", "--data", str(data), "--out", str(run)]
    changed = [part for setting in settings for part in ("--set", setting)]
    arguments = ["--resume", str(run)] if run.exists() else start
    done = subprocess.run([sys.executable, "-m", "stablefield", "train", *arguments, *changed])
    if done.returncode:
        sys.exit(done.returncode)


def save_samples(run: Path, columns: int = 16) -> None:
    """Write samples of every class with their nearest training images, and print the fraction of copies."""
    trained = open_run(run)
    images = training_data(trained, way_out="draw the emoji with the same font again")
    x = images.take(torch.arange(len(images)))
    both = Pool(torch.cat([x, x.flip(-1)]))
    rows, copies = [], 0.0
    for label in range(trained.denoiser.num_classes):
        seeds = range(label * columns, (label + 1) * columns)
        labels = torch.full((columns,), label)
        samples = build_sampler(trained.config)(trained.denoiser, trained.shape, seeds=seeds, label=labels).x.float()
        nearest = find_nearest(samples, both)
        rows += [samples, both.take(nearest.index[:, 0])]
        copies += float(nearest.copies().float().mean()) / trained.denoiser.num_classes
    save_sheet(run / "emoji.png", torch.cat(rows), columns=columns)
    print(f"{run / 'emoji.png'}: samples, each above its nearest training image; {copies:.0%} are copies")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--font", default=DEBIAN, help=f"file of the font ({DEBIAN})")
    parser.add_argument("--data", type=Path, default=Path("data/emoji"), help="folder that the images are drawn into")
    parser.add_argument("--run", type=Path, default=Path("runs/emoji"), help="folder of the run")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="SECTION.KEY=VALUE")
    options = parser.parse_args()
    if not Path(options.font).exists():
        parser.error(f"there is no font {options.font}: apt-get install fonts-noto-color-emoji, or choose another")
    draw(options.data, options.font)
    train(options.run, options.data, options.settings)
    save_samples(options.run)
