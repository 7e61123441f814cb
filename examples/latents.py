"""Train in the latent space of an autoencoder: encode images once, train on the latents, sample, and decode.

    python examples/latents.py                               digits in 16 principal components, about a minute
    python examples/latents.py --data FOLDER --vae MODEL     images of 3 channels and an AutoencoderKL of diffusers

It writes RUN-data/latents.npz (floats, with labels), the run itself, and the decoded samples as RUN/samples.png.
Settings can be changed as for `stablefield train`, for example with --set training.images=20000. The same command
resumes a run.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from stablefield import Pool
from stablefield.build import build_sampler
from stablefield.config import resolve
from stablefield.data import guess_kind
from stablefield.generate.images import save_sheet
from stablefield.run import open_run

SIGMA_DATA = 0.5


class Autoencoder(Protocol):
    """Anything that encodes images in [-1, 1] and decodes latents."""

    def encode(self, x: Tensor) -> Tensor:
        """Latents of images."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents."""


class PCA:
    """The best linear autoencoder of the training images."""

    def __init__(self, x: Tensor, dims: int = 16) -> None:
        self.shape, flat = x.shape[1:], x.flatten(1).double()
        self.mean = flat.mean(0)
        self.basis = torch.linalg.svd(flat - self.mean, full_matrices=False).Vh[:dims]

    def encode(self, x: Tensor) -> Tensor:
        """Latents of images."""
        return ((x.flatten(1).double() - self.mean) @ self.basis.T).float()

    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents."""
        return (latents.double() @ self.basis + self.mean).float().view(-1, *self.shape)


class Diffusers:
    """An AutoencoderKL of diffusers: a folder, or a name on the hub. Latents are means, not samples."""

    def __init__(self, name: str, device: str = "cuda" if torch.cuda.is_available() else "cpu") -> None:
        from diffusers import AutoencoderKL

        self.vae = AutoencoderKL.from_pretrained(name).to(device).eval()

    def encode(self, x: Tensor) -> Tensor:
        """Latents of images."""
        return self.vae.encode(x.to(self.vae.device)).latent_dist.mean.cpu()

    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents."""
        return self.vae.decode(latents.to(self.vae.device)).sample.cpu()


@torch.no_grad()
def save_latents(path: Path, pool: Pool, autoencoder: Autoencoder, batch_size: int = 64) -> None:
    """Write the latents of all images, shifted and scaled to mean 0 and the standard deviation that EDM expects."""
    parts = torch.arange(len(pool)).split(batch_size)
    latents = torch.cat([autoencoder.encode(pool.take(part)) for part in parts])
    shift, scale = latents.mean(), latents.std() / SIGMA_DATA
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = {} if pool.labels is None else {"labels": pool.labels.numpy()}
    np.savez(path, data=((latents - shift) / scale).numpy(), **labels)
    np.savez(path.with_name("scaling.npz"), shift=shift.numpy(), scale=scale.numpy())


def train(run: Path, latents: Path, settings: list[str]) -> None:
    """Start the run with `stablefield train`, or resume it."""
    with np.load(latents) as file:
        network = "mlp" if file["data"].ndim == 2 else "unet"
    default = [f"network.kind={network}", "training.images=200_000"]
    default += [f"{section}.sigma_data={SIGMA_DATA}" for section in ("preconditioning", "weight")]
    start = ["--data", str(latents), "--out", str(run), *as_options(default)]
    arguments = ["--resume", str(run)] if (run / "config.toml").exists() else start
    done = subprocess.run([sys.executable, "-m", "stablefield", "train", *arguments, *as_options(settings)])
    if done.returncode:
        sys.exit(done.returncode)


def as_options(settings: list[str]) -> list[str]:
    """Settings as options of the command line."""
    return [part for setting in settings for part in ("--set", setting)]


@torch.no_grad()
def save_samples(run: Path, scaling: Path, autoencoder: Autoencoder, count: int = 64) -> None:
    """Sample latents, decode them, and write the images."""
    trained = open_run(run)
    latents = build_sampler(trained.config)(trained.denoiser, trained.shape, seeds=range(count)).x.cpu().float()
    with np.load(scaling) as file:
        images = autoencoder.decode(latents * float(file["scale"]) + float(file["shift"]))
    save_sheet(run / "samples.png", images.clamp(-1, 1), columns=8)
    print(run / "samples.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="images, of 3 channels for --vae (scikit-learn's digits)")
    parser.add_argument("--vae", metavar="MODEL", help="AutoencoderKL of diffusers; by default principal components")
    parser.add_argument("--run", type=Path, default=Path("runs/latents"), help="folder of the run")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="SECTION.KEY=VALUE")
    options = parser.parse_args()
    kind, where = guess_kind(options.data)
    pool = resolve({"data": {"kind": kind, **({"path": where} if where else {})}}).make("data").load()
    autoencoder = PCA(pool.take(torch.arange(len(pool)))) if options.vae is None else Diffusers(options.vae)
    latents = options.run.with_name(f"{options.run.name}-data") / "latents.npz"
    if not latents.exists():
        save_latents(latents, pool, autoencoder)
    train(options.run, latents, options.settings)
    save_samples(options.run, latents.with_name("scaling.npz"), autoencoder)
