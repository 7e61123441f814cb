"""Features to judge samples by: maps from data to vectors between which distances mean something.

Raw values need nothing; any network that was exported to a file can be used; `classifier.py` trains one on the data's
own labels, and `inception.py` has the one that FID is defined by. A number is comparable only with numbers in the same
features, so all carry an identity, weights included.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stablefield.evaluate.frechet import Statistics

MOST_FEATURES = 12_288  # 64 x 64 pixels in colour: a covariance of 1.1 GiB


class Features(ABC):
    """A map from data in [-1, 1] to vectors.

    Attributes:
        name: what people call it.
        identity: what tells it from any other; numbers are comparable between equal ones.
        frechet: what the Frechet distance is called in it.
        kernel: what the kernel distance is called in it.
        device: where it is computed.
    """

    name: str
    identity: str
    frechet = "frechet"
    kernel = "kernel"
    device = torch.device("cpu")

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "n *D"]) -> Float[Tensor, "n F"]:
        """Features of data, on the CPU.

        Raises:
            ValueError: data that it cannot look at, too many features for a covariance, or some that are not finite.
        """
        found = self.of(x.float().to(self.device)).flatten(1).float().cpu()
        if found.shape[1] > MOST_FEATURES:
            raise ValueError(
                f"{found.shape[1]:,} features ({self.name}) have a covariance too large to work with; at most "
                f"{MOST_FEATURES:,} are possible: choose other features, a classifier or a network"
            )
        if not found.isfinite().all():
            raise ValueError(f"some features ({self.name}) are not finite")
        return found

    @abstractmethod
    def of(self, x: Float[Tensor, "n *D"]) -> Tensor:
        """Features on the device, (n, ...)."""

    def unit(self, reference: Statistics) -> float:
        """What features are divided by before the kernel, which compares them with 1: their root mean square."""
        square = float((reference.covariance.trace() + reference.mean.square().sum()) / len(reference.mean))
        return max(0.0, square) ** 0.5  # a trace may be below zero by rounding

    def scores(self, features: Float[Tensor, "n F"]) -> dict[str, float]:
        """What can be said of samples from these features of theirs alone, by name."""
        return {}

    def about(self) -> dict[str, str | float]:
        """What numbers in these features must carry along."""
        return {"name": self.name, "identity": self.identity}


class Pixels(Features):
    """The data as they are: all values, as one vector."""

    name = identity = "pixels"

    def of(self, x: Float[Tensor, "n *D"]) -> Tensor:
        return x


class Exported(Features):
    """A network from a file: exported by `torch.export` (.pt2), or TorchScript (.pt, .pth).

    It is asked about float32 data in [-1, 1], (n, *D), and answers (n, ...); whatever preparation it needs belongs
    into the file. The number of rows must be left open when it is exported.

    Args:
        path: the file; it holds a program, so it should come from somebody you trust.
        device: where to run it.

    Raises:
        ValueError: no such file, or no exported network in it.
    """

    def __init__(self, path: Path, device: str | torch.device = "cpu") -> None:
        if not path.is_file():
            raise ValueError(f"there is no file {path}, and features are pixels, classifier, inception or a file")
        self.name = path.name
        self.identity = f"{path.name}:{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
        self.device = torch.device(device)
        try:
            self.network = _opened(path, self.device)
        except Exception as error:  # a foreign format: anything may go wrong
            raise ValueError(
                f"{path} holds no exported network (.pt2 by torch.export.save, .pt or .pth by torch.jit.save): "
                f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
            ) from None

    def of(self, x: Float[Tensor, "n *D"]) -> Tensor:
        try:
            found = self.network(x)
        except Exception as error:  # a foreign program
            raise ValueError(f"{self.name} cannot be asked about data {tuple(x.shape)}: {error}") from None
        if not isinstance(found, Tensor) or found.ndim < 2 or len(found) != len(x):
            said = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"{self.name} answers {said} when asked about {tuple(x.shape)}; it must answer (n, ...)")
        return found


def _opened(path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    if path.suffix != ".pt2":
        return torch.jit.load(path, map_location=device).eval()
    from torch.export.passes import move_to_device_pass

    network: nn.Module = move_to_device_pass(torch.export.load(path), device).module()
    return network
