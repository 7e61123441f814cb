"""Features to judge samples by: maps from data to vectors between which distances mean something.

Raw values need nothing; any network that was exported to a file can be used; `classifier.py` trains one on the data's
own labels, and `inception.py` has the one that FID is defined by. A number is comparable only with numbers in the same
features, so all carry an identity, weights included.
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

from stablefield.evaluate.frechet import Statistics

MOST_FEATURES = 12_288  # 64 x 64 pixels in colour: a covariance of 1.1 GiB


class Features(ABC):
    """A map from data, images in [-1, 1] and floats as they are, to vectors.

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
    """A network from a file: TorchScript (.pt, .pth), or exported by `torch.export` (.pt2) if the file is trusted.

    It is asked about float32 data (n, *D), images in [-1, 1] and floats as they are, and answers (n, ...); whatever
    preparation it needs belongs into the file. The number of rows must be left open when it is exported. TorchScript is
    interpreted by torch, which computes and does no more, except for the few operations that read and write files: a
    file with one of them is refused. A `.pt2` file can make Python run any code.

    Args:
        path: the file.
        device: where to run it.
        trusted: open files that can run code, too.

    Raises:
        ValueError: no such file, no network in it, or one that can run code.
    """

    def __init__(self, path: Path, device: str | torch.device = "cpu", *, trusted: bool = False) -> None:
        if not path.is_file():
            raise ValueError(f"there is no file {path}, and features are pixels, classifier, inception or a file")
        content = path.read_bytes()
        self.name = path.name
        self.identity = f"{path.name}:{hashlib.sha256(content).hexdigest()[:16]}"
        self.device = torch.device(device)
        try:
            self.network = _opened(path, content, self.device, trusted)
        except Untrusted:
            raise
        except Exception as error:  # a foreign format: anything may go wrong
            raise ValueError(
                f"{path} holds no exported network (.pt or .pth by torch.jit.save, .pt2 by torch.export.save): "
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


class Untrusted(ValueError):
    """A file that could run code when it is opened or used."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(
            f"{path} {why}; if you trust whoever made it, open it by --trust-features at the terminal, trusted=True in "
            "Python; otherwise ask for TorchScript (torch.jit.save) that only computes"
        )


def _opened(path: Path, content: bytes, device: torch.device, trusted: bool) -> Callable[[Tensor], Tensor]:
    if path.suffix == ".pt2":
        if not trusted:
            raise Untrusted(path, "is a network of torch.export, and such a file can run any code")
        from torch.export.passes import move_to_device_pass

        network: nn.Module = move_to_device_pass(torch.export.load(io.BytesIO(content)), device).module()
        return network
    if not trusted and (found := _beyond_computing(content)):
        raise Untrusted(path, f"is TorchScript that contains {found}, by which a file can do more than compute")
    return torch.jit.load(io.BytesIO(content), map_location=device).eval()


# what TorchScript can name that reads or writes files, asks other processes, or leaves torch's own operations
BEYOND = re.compile(
    r"\b(?:from_file|save|load_tensor|rpc_\w+)\b|\btorch\s*\.\s*classes\b|\bops\s*\.\s*(?!(?:aten|prim)\b)\w+"
)


def _beyond_computing(content: bytes) -> str | None:
    """The first thing in a TorchScript archive that does more than compute; None if there is none.

    The archive is read by the reader that will load it, so that both see the same; names can be written in no other
    way but letter by letter, or as a string for `getattr`, where escapes are refused.

    Raises:
        RuntimeError: It is not an archive.
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
            if found := BEYOND.search(code):
                return found[0]
            if "getattr" in code and "\\" in code:
                return "getattr beside an escaped string"
    return None
