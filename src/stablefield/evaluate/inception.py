"""Inception features, which FID, KID and the Inception score are defined by (Heusel et al. 2017).

The network comes from torch-fidelity (the extra `fidelity`), with weights converted from the original TensorFlow file.
It resizes images to 299 x 299 and has 2,048 features. The library is imported only when an `Inception` is created.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from stablefield.checkpoint import checksum
from stablefield.evaluate.features import Features
from stablefield.evaluate.frechet import Statistics
from stablefield.generate.images import to_bytes

NUM_FEATURES = 2048
_ALTERNATIVES = "--features classifier and --features pixels need no download"


class Inception(Features):
    """Inception features of images; grey images get three equal channels.

    Args:
        weights: file with the weights; by default torch-fidelity downloads it.
        device: device to run the network on.

    Attributes:
        network: torch-fidelity's feature extractor.

    Raises:
        ValueError: torch-fidelity is not installed or cannot be imported; the weights cannot be downloaded; or the file
            does not hold them.
    """

    name, frechet_name, kernel_name = "inception", "fid", "kid"

    def __init__(self, weights: Path | None = None, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self.network = _load_extractor(weights).to(self.device)
        self.identity = f"inception:{checksum(self.network.state_dict(), {})[:16]}"

    @override
    def compute(self, x: Float[Tensor, "n C H W"]) -> Float[Tensor, "n 2048"]:
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise ValueError(f"Inception needs images of one or three channels, not {tuple(x.shape[1:])}")
        return self.network(to_bytes(x).expand(-1, 3, -1, -1))[0]

    @override
    def scale(self, reference: Statistics) -> float:
        return 1.0  # KID is defined on the features as they are

    @override
    def reference_notes(self, reference: Statistics) -> list[str]:
        if reference.features:
            return []
        return [
            "the reference does not name the network that made it, as published files do not: another implementation "
            "of Inception than torch-fidelity's changes FID a little; give the images as the reference to compare"
        ]

    @override
    def extra_scores(self, features: Float[Tensor, "n 2048"]) -> dict[str, float]:
        # the Inception score over ten parts (Salimans et al. 2016)
        from torch_fidelity.metric_isc import isc_features_to_metric

        # the logits without bias are linear in the features
        score = isc_features_to_metric(features.cpu() @ self.network.fc.weight.T.cpu())
        return {"inception_score": score["inception_score_mean"], "inception_score_std": score["inception_score_std"]}


def _load_extractor(weights: Path | None) -> Any:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ValueError(
            f"FID needs torch-fidelity ({error}): pip install '.[fidelity]' in a clone; {_ALTERNATIVES}"
        ) from None
    except Exception as error:  # it imports torchvision, which raises various errors if it does not match torch
        raise ValueError(f"torch-fidelity cannot be imported here ({error}); {_ALTERNATIVES}") from None
    if weights is not None:
        _check_weights(weights)
    try:
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(weights) if weights else None)
    except OSError as error:
        raise ValueError(
            f"Inception's weights could not be downloaded ({error}): pass the file as --weights FILE; {_ALTERNATIVES}"
        ) from None
    except (RuntimeError, AttributeError, TypeError) as error:
        raise ValueError(f"{weights} does not hold weights of Inception: {str(error).splitlines()[0]}") from None


def _check_weights(weights: Path) -> None:
    """Refuse a file that holds anything but tensors, because torch-fidelity would execute code in it."""
    if not weights.is_file():
        raise ValueError(f"there is no file {weights}")
    try:
        torch.load(weights, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{weights} does not hold weights: {str(error).splitlines()[0]}") from None
