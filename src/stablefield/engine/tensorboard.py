"""Samples from the same seeds throughout a run, and TensorBoard events."""

import io
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from stablefield.denoise import Denoiser
from stablefield.distributed import Ranks
from stablefield.files import append
from stablefield.generate.images import save_sheet
from stablefield.run import RunFolder
from stablefield.sample import Sampler


def samples(
    denoiser: Denoiser, sampler: Sampler, shape: tuple[int, ...], ranks: Ranks, count: int = 64
) -> Float[Tensor, "{count} *D"]:
    """Samples of the seeds 0, 1, ..., on the CPU of every rank; values that are not finite become finite.

    Args:
        denoiser: the model; if it has classes, they appear in order and equally often.
        sampler: the sampler.
        shape: shape of one sample.
        ranks: this process and those it trains with, among which the seeds are divided; all must call this.
        count: number of samples.
    """
    share = -(-count // ranks.world_size)
    seeds = range(ranks.rank * share, (ranks.rank + 1) * share)
    classes = torch.arange(ranks.world_size * share).mul(denoiser.num_classes).div(count, rounding_mode="floor")
    label = classes.clamp(max=denoiser.num_classes - 1)[list(seeds)] if denoiser.num_classes else None
    own = sampler(denoiser, shape, seeds=seeds, label=label).x
    return ranks.all_gather(own)[:count].cpu().nan_to_num()


class TensorBoardWriter:
    """Writer of TensorBoard events and of sheets of samples.

    Events are written at once, and not by a thread as in TensorBoard's own writers, so that a full disk raises an error
    in the training loop.

    Args:
        folder: folder of the run.
        images: images seen so far. TensorBoard drops earlier events of later steps, which the run repeats.

    Raises:
        OSError: the folder cannot be written, here and in every method.
    """

    def __init__(self, folder: RunFolder, images: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.folder, self.event, self.summary = folder, event_pb2, summary_pb2.Summary
        folder.tensorboard.mkdir(exist_ok=True)
        self.path = folder.tensorboard / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self.record_writer = RecordWriter
        self._write(file_version="brain.Event:2")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(session_log=start, step=images + 1)

    def add_metrics(self, metrics: Mapping[str, float], images: int) -> None:
        """Write metrics as scalars.

        Args:
            metrics: values by name; progress and timestamp are left out, since every event has its own.
            images: number of training images seen, the step of the event.
        """
        names = sorted(metrics.keys() - {"progress/kimg", "timestamp"})
        values = [self.summary.Value(tag=name, simple_value=metrics[name]) for name in names]
        self._write(summary=self.summary(value=values), step=images)

    def add_sheet(self, x: Float[Tensor, "n C H W"], images: int) -> None:
        """Write samples side by side as one image (a sheet): a PNG file in the folder of the run, and an image event.

        Args:
            x: the samples, in [-1, 1].
            images: number of training images seen: the step of the event, and the name of the file.
        """
        path = self.folder.sheets / f"{images:09d}.png"
        save_sheet(path, x)
        width, height = Image.open(path).size
        image = self.summary.Image(
            height=height, width=width, colorspace=x.shape[1], encoded_image_string=path.read_bytes()
        )
        self._write(summary=self.summary(value=[self.summary.Value(tag="samples", image=image)]), step=images)

    def _write(self, **fields: Any) -> None:
        """Append an event with these fields to the file."""
        record = io.BytesIO()
        self.record_writer(record).write(self.event.Event(wall_time=time.time(), **fields).SerializeToString())
        append(self.path, record.getvalue())
