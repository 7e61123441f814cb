"""Runs of a small network on digits, which take less than a second, and what tests compare in them."""

from collections.abc import Callable
from pathlib import Path

import torch

from stablefield.build import build
from stablefield.checkpoint import read
from stablefield.config import Config, override, resolve
from stablefield.engine.fit import fit
from stablefield.run import RunFolder

SMALL = ["network.kind=mlp", "network.width=8", "network.layers=1", "target.size=16", "training.batch_size=32"]
SHORT = ["training.images=320", "training.save_every=64", "training.log_every=32"]


def configured(*settings: str) -> Config:
    return resolve(override({}, [*SMALL, *SHORT, *settings]))


def trained(folder: Path, *settings: str, **options) -> int:
    config = configured(*settings)
    return fit(config, build(config), RunFolder(folder), **options)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return read(RunFolder(folder).checkpoint).tensors


def same(one: Path, other: Path) -> bool:
    mine, theirs = tensors(one), tensors(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def seen(folder: Path) -> list[int]:
    return [round(1000 * line["progress/kimg"]) for line in RunFolder(folder).history()]


def untimed(folder: Path) -> list[dict]:
    lines = RunFolder(folder).history()
    return [{k: v for k, v in line.items() if not k.startswith(("timing", "resources", "timestamp"))} for line in lines]


class Interrupted(Exception):
    """An error that ends a run."""


def interrupt_at(images: int) -> Callable:
    def on_step(seen: int, metrics: object) -> None:
        if seen >= images:
            raise Interrupted

    return on_step
