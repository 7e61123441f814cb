"""Backbones: called as network(x, c_noise, label=..., augment=...), and knowing nothing of diffusion."""

from stablefield.networks.adm import ADM, adm
from stablefield.networks.mlp import MLP
from stablefield.networks.song import SongUNet, ddpmpp, ncsnpp
from stablefield.networks.unet import UNet

__all__ = ["ADM", "MLP", "SongUNet", "UNet", "adm", "ddpmpp", "ncsnpp"]
