"""Feature spaces: maps from data to vectors in which distances are meaningful.

`Pixels` needs no network; `ExportedNetwork` runs any network that was exported to a file; `Classifier` (in
`classifier.py`) is trained on the labels of the data; and `Inception` (in `inception.py`) is the network that FID is
defined by. Scores are comparable only in equal features, so all features have an identity, which includes a hash of
their weights.
"""

import hashlib
import io
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from stablefield.evaluate.frechet import Statistics

_MAX_FEATURES = 12_288  # 64 x 64 pixels in colour: a covariance of 1.1 GiB


class Features(ABC):
    """Base class of maps from data (images in [-1, 1], other floats as they are) to feature vectors.

    Attributes:
        name: short name.
        identity: name and a hash of the weights; scores are comparable only where it is equal.
        frechet_name: name of the Frechet distance in these features.
        kernel_name: name of the kernel distance in these features.
        device: device that the features are computed on.
    """

    name: str
    identity: str
    frechet_name = "frechet"
    kernel_name = "kernel"
    device = torch.device("cpu")

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "n *D"]) -> Float[Tensor, "n F"]:
        """Features of data, float32 on the device of the features.

        Args:
            x: the data, (n, *D).

        Raises:
            ValueError: the data have the wrong shape, there are too many features for a covariance, or some are not
                finite.
        """
        features = self.compute(x.float().to(self.device)).flatten(1).float()
        if features.shape[1] > _MAX_FEATURES:
            raise ValueError(
                f"{features.shape[1]:,} features ({self.name}) are too many for a covariance; use at most "
                f"{_MAX_FEATURES:,}: choose other features, such as a classifier or a network"
            )
        if not features.isfinite().all():
            raise ValueError(f"some features ({self.name}) are not finite")
        return features

    @abstractmethod
    def compute(self, x: Float[Tensor, "n *D"]) -> Tensor:
        """Features on the device, (n, ...); `__call__` flattens and checks them.

        Args:
            x: the data, float32 on the device.
        """

    def scale(self, reference: Statistics) -> float:
        """Scale that features are divided by before the kernel distance: by default their root mean square.

        The kernel (x . y / F + 1)^3 compares products of features with 1.

        Args:
            reference: statistics of the reference data.
        """
        mean_square = float((reference.covariance.trace() + reference.mean.square().sum()) / len(reference.mean))
        return max(0.0, mean_square) ** 0.5  # rounding may make a trace negative

    def reference_notes(self, reference: Statistics) -> list[str]:
        """Sentences on what limits scores against these statistics.

        Args:
            reference: statistics of the reference's features.
        """
        return []

    def extra_scores(self, features: Float[Tensor, "n F"]) -> dict[str, float]:
        """Further scores of samples, by name, that need no reference; by default none.

        Args:
            features: features of the samples.
        """
        return {}

    def metadata(self) -> dict[str, str | float]:
        """Description of these features that is stored with every score."""
        return {"name": self.name, "identity": self.identity}


class Pixels(Features):
    """The data themselves: all values as one vector."""

    name = identity = "pixels"

    @override
    def compute(self, x: Float[Tensor, "n *D"]) -> Tensor:
        return x


class ExportedNetwork(Features):
    """A network from a file: TorchScript (.pt, .pth) or, only if the file is trusted, `torch.export` (.pt2).

    It is called with float32 data (n, *D), images in [-1, 1] and other floats as they are, and must return (n, ...).
    Any preprocessing belongs in the file, and the batch size must be dynamic. TorchScript is interpreted by torch and
    can only compute, except for a few operations that read and write files: a file that contains one of them is
    refused. A `.pt2` file can run any Python code.

    Args:
        path: the file.
        device: device to run the network on.
        trusted: also open files that can run code.

    Raises:
        ValueError: there is no such file, it does not hold a network, or it can run code and is not trusted.
    """

    def __init__(self, path: Path, device: str | torch.device = "cpu", *, trusted: bool = False) -> None:
        if not path.is_file():
            raise ValueError(f"there is no file {path}; choose pixels, classifier, inception or the file of a network")
        content = path.read_bytes()
        self.name = path.name
        self.identity = f"{path.name}:{hashlib.sha256(content).hexdigest()[:16]}"
        self.device = torch.device(device)
        try:
            self.network = _load_network(path, content, self.device, trusted)
        except _UntrustedFileError:
            raise
        except Exception as error:  # a file that somebody else made may fail in any way
            raise ValueError(
                f"{path} does not hold an exported network (.pt or .pth by torch.jit.save, .pt2 by torch.export.save): "
                f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
            ) from None

    @override
    def compute(self, x: Float[Tensor, "n *D"]) -> Tensor:
        try:
            features = self.network(x)
        except Exception as error:  # a network that somebody else made may fail in any way
            raise ValueError(f"{self.name} cannot be applied to data of shape {tuple(x.shape)}: {error}") from None
        if not isinstance(features, Tensor) or features.ndim < 2 or len(features) != len(x):
            result = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"{self.name} returns {result} for data {tuple(x.shape)}; it must return (n, ...)")
        return features


class _UntrustedFileError(ValueError):
    """Error for a file that could run code when it is opened or used, with the reason."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"{path} {reason}; if you trust its author, pass --trust-features (trusted=True in Python); otherwise "
            "export the network as TorchScript that only computes (torch.jit.save)"
        )


def _load_network(path: Path, content: bytes, device: torch.device, trusted: bool) -> Callable[[Tensor], Tensor]:
    if path.suffix == ".pt2":
        if not trusted:
            raise _UntrustedFileError(path, "is a network of torch.export, and such a file can run any code")
        from torch.export.passes import move_to_device_pass

        network: nn.Module = move_to_device_pass(torch.export.load(io.BytesIO(content)), device).module()
        return network
    if not trusted and (name := _unsafe_name(content)):
        raise _UntrustedFileError(
            path, f"is TorchScript that contains {name}, by which a file can do more than compute"
        )
    return torch.jit.load(io.BytesIO(content), map_location=device).eval()


# names in TorchScript that read or write files, call other processes, or are not torch's own operations
_UNSAFE = re.compile(
    r"\b(?:from_file|save|load_tensor|rpc_\w+)\b|\btorch\s*\.\s*classes\b|\bops\s*\.\s*(?!(?:aten|prim)\b)\w+"
)


def _unsafe_name(content: bytes) -> str | None:
    """The first name in a TorchScript archive that does more than compute; None if there is none.

    The archive is read by the reader that will load it, so that both see the same content. A name can only be written
    literally, or as a string given to `getattr`, where escapes are refused.

    Raises:
        RuntimeError: it is not an archive.
    """
    if not content.startswith(b"PK\x03\x04"):
        raise RuntimeError("it is not a ZIP archive, as TorchScript is")
    reader = torch._C.PyTorchFileReader(io.BytesIO(content))
    records = reader.get_all_records()
    if "model.json" in records:
        return "the layout of torch before 1.1"
    for name in records:
        if name.endswith(".py"):
            code = reader.get_record(name).decode(errors="replace")
            if match := _UNSAFE.search(code):
                return match[0]
            if "getattr" in code and "\\" in code:
                return "getattr beside an escaped string"
    return None
