"""The network that FID, KID and the Inception score are defined by, from torch-fidelity (the extra `fidelity`).

Its 2,048 features of images brought to 299 x 299 are those of Heusel et al. 2017, with weights converted from the
original TensorFlow file. The library is imported when it is asked for, and nothing else here needs it.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stablefield.checkpoint import checksum
from stablefield.evaluate.features import Features
from stablefield.evaluate.frechet import Statistics
from stablefield.evaluate.pictures import to_bytes

DIMENSION = 2048
ELSEWHERE = "features that need no download are --features classifier and --features pixels"


class Inception(Features):
    """Inception's features of images; grey ones are seen with three equal channels.

    Args:
        weights: the file that torch-fidelity would download; None lets it.
        device: where to run it.

    Raises:
        ValueError: torch-fidelity is not there, or cannot be imported; the weights cannot be downloaded, or are none.
    """

    name, frechet, kernel = "inception", "fid", "kid"

    def __init__(self, weights: Path | None = None, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self.network = _extractor(weights).to(self.device)
        self.identity = f"inception:{checksum(self.network.state_dict(), {})[:16]}"

    def of(self, x: Float[Tensor, "n C H W"]) -> Float[Tensor, "n 2048"]:
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise ValueError(f"Inception looks at images of one or three channels, not at {tuple(x.shape[1:])}")
        return self.network(to_bytes(x).expand(-1, 3, -1, -1))[0]

    def unit(self, reference: Statistics) -> float:
        """KID takes the features as they are."""
        return 1.0

    def scores(self, features: Float[Tensor, "n 2048"]) -> dict[str, float]:
        """The Inception score over ten parts (Salimans et al. 2016), from the library."""
        from torch_fidelity.metric_isc import isc_features_to_metric

        # the library's "logits_unbiased" are linear in the features
        found = isc_features_to_metric(features @ self.network.fc.weight.T.cpu())
        mean, deviation = found["inception_score_mean"], found["inception_score_std"]
        return {"inception_score": mean, "inception_score_deviation": deviation}


def _extractor(weights: Path | None) -> Any:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ValueError(
            f"FID needs torch-fidelity ({error}): pip install 'stablefield[fidelity]'; {ELSEWHERE}"
        ) from None
    except Exception as error:  # it brings torchvision along, which fails in its own way where it does not fit torch
        raise ValueError(f"torch-fidelity cannot be imported here ({error}); {ELSEWHERE}") from None
    if weights is not None:
        _check(weights)
    try:
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(weights) if weights else None)
    except OSError as error:
        raise ValueError(
            f"Inception's weights could not be downloaded ({error}): give the file as --weights FILE; {ELSEWHERE}"
        ) from None
    except (RuntimeError, AttributeError, TypeError) as error:
        raise ValueError(f"{weights} holds no weights of Inception: {str(error).splitlines()[0]}") from None


def _check(weights: Path) -> None:
    """That a file holds tensors and nothing to execute: the library itself would execute it."""
    if not weights.is_file():
        raise ValueError(f"there is no file {weights}")
    try:
        torch.load(weights, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{weights} holds no weights: {str(error).splitlines()[0]}") from None
