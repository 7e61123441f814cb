"""Backbones: called as network(x, c_noise, label=..., augment=...), and knowing nothing of diffusion."""

from stablefield.networks.mlp import MLP
from stablefield.networks.unet import UNet

__all__ = ["MLP", "UNet"]
