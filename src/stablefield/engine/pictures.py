"""What people look at while it trains: samples from the same seeds again and again, and TensorBoard."""

from collections.abc import Mapping

import numpy as np
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
    """TensorBoard's files, and the grids beside them; what was there from after `images` counts no more."""

    def __init__(self, folder: Folder, images: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self.writer = SummaryWriter(folder.tensorboard, purge_step=images + 1)

    def numbers(self, line: Mapping[str, float], images: int) -> None:
        """The numbers of a line of the metrics."""
        for name in line.keys() - {"Progress/kimg", "timestamp"}:
            self.writer.add_scalar(name, line[name], images)
        self.writer.flush()

    def grid(self, x: Float[Tensor, "n C H W"], images: int) -> None:
        """Samples, as a picture of them all."""
        self.folder.grids.mkdir(exist_ok=True)
        with replacing(self.folder.grids / f"{images:09d}.png") as beside:
            save_grid(beside, x)
        picture = np.asarray(Image.open(self.folder.grids / f"{images:09d}.png"))
        self.writer.add_image("samples", picture, images, dataformats="HWC" if picture.ndim == 3 else "HW")

    def close(self) -> None:
        """Write what is not yet written."""
        self.writer.close()
