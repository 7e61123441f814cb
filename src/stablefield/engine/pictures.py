"""What people look at while it trains: samples from the same seeds again and again, and TensorBoard."""

import os
import socket
import time
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from stablefield.checkpoint import replacing
from stablefield.denoise import Denoiser
from stablefield.evaluate.pictures import save_grid
from stablefield.ranks import Ranks
from stablefield.run import Folder
from stablefield.sample import Sampler


def samples(
    denoiser: Denoiser, sampler: Sampler, shape: tuple[int, ...], ranks: Ranks, count: int = 64
) -> Float[Tensor, "{count} *D"]:
    """Samples of the seeds 0, 1, ..., with classes in order and evenly spread; each rank makes its share."""
    share = -(-count // ranks.total)
    seeds = range(ranks.rank * share, (ranks.rank + 1) * share)
    classes = torch.arange(ranks.total * share).mul(denoiser.label_dim).div(count, rounding_mode="floor")
    label = classes.clamp(max=denoiser.label_dim - 1)[list(seeds)] if denoiser.label_dim else None
    made = sampler(denoiser, shape, seeds=seeds, label=label).x
    return ranks.gather(made)[:count].cpu().nan_to_num()


class Board:
    """TensorBoard's events, and grids beside them.

    Events are written at once, and not by a thread as TensorBoard's own writers do: a full disk is then an error here.

    Args:
        folder: of the run.
        images: seen by now; events from after that, of a part of the run that happens again, count no more.
    """

    def __init__(self, folder: Folder, images: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.folder, self.event, self.summary = folder, event_pb2, summary_pb2.Summary
        folder.tensorboard.mkdir(exist_ok=True)
        self.file = folder.tensorboard / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self.record = RecordWriter
        self._write(file_version="brain.Event:2")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(session_log=start, step=images + 1)

    def numbers(self, line: Mapping[str, float], images: int) -> None:
        """The numbers of a line of the metrics."""
        names = sorted(line.keys() - {"Progress/kimg", "timestamp"})
        values = [self.summary.Value(tag=name, simple_value=line[name]) for name in names]
        self._write(summary=self.summary(value=values), step=images)

    def grid(self, x: Float[Tensor, "n C H W"], images: int) -> None:
        """Samples, as a picture of them all."""
        self.folder.grids.mkdir(exist_ok=True)
        place = self.folder.grids / f"{images:09d}.png"
        with replacing(place) as beside:
            save_grid(beside, x)
        width, height = Image.open(place).size
        picture = self.summary.Image(
            height=height, width=width, colorspace=x.shape[1], encoded_image_string=place.read_bytes()
        )
        self._write(summary=self.summary(value=[self.summary.Value(tag="samples", image=picture)]), step=images)

    def _write(self, **what: Any) -> None:
        """Raises:
        OSError: the disk is full, or cannot be written.
        """
        event = self.event.Event(wall_time=time.time(), **what)
        try:
            with self.file.open("ab") as file:
                self.record(file).write(event.SerializeToString())
        except OSError as error:
            raise OSError(f"could not write {self.file} ({error})") from error
