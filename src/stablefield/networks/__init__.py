"""Network architectures, called as `network(x, c_noise, label_one_hot=..., augment_label=...)`."""

from stablefield.networks.adm_unet import ADM, adm
from stablefield.networks.mlp import MLP
from stablefield.networks.song import SongUNet, ddpmpp, ncsnpp
from stablefield.networks.unet import UNet

__all__ = ["ADM", "MLP", "SongUNet", "UNet", "adm", "ddpmpp", "ncsnpp"]
