"""Features of a small classifier that is trained on the labels of the data set.

It needs no download, and its features reflect what matters in these data. It is trained once and kept in the cache.
Another data set, seed or recipe gives another classifier, and distances are comparable only within one classifier.
"""

import json
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from typing_extensions import override

from stablefield.checkpoint import checksum, write_tensors
from stablefield.data import Progress, ShuffledBatches, content_hash, silent
from stablefield.evaluate.features import Features
from stablefield.files import cache_folder, cached
from stablefield.pool import Pool
from stablefield.seeding import derive, generator

_RECIPE = "stablefield classifier 1"  # the number must increase when the network or its training changes
_EPOCHS, _MAX_IMAGES = 30, 300_000


class _Network(nn.Module):
    """Convolutional classifier with one linear layer, the head, between the features and the classes.

    Images (C, H, W) are downsampled until their longer side has at most 8 pixels.
    """

    def __init__(self, shape: tuple[int, ...], num_classes: int, width: int = 64) -> None:
        super().__init__()
        channels, side = shape[0], max(shape[1:])
        layers: list[nn.Module] = [nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU()]
        inner = 32
        while side > 8:
            layers += [nn.MaxPool2d(2, ceil_mode=True), nn.Conv2d(inner, 64, 3, padding=1), nn.ReLU()]
            inner, side = 64, -(-side // 2)
        if inner == 32:
            layers += [nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(4), nn.Flatten(), nn.Linear(64 * 16, width), nn.ReLU())
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B num_classes"]:
        return self.head(self.body(x))


class Classifier(Features):
    """Features of a trained classifier: the input of its last layer.

    Attributes:
        network: the trained network, for images in [-1, 1]; it is set to evaluation mode.
        accuracy: fraction of held-out images that it classifies correctly.
    """

    name = "classifier"

    def __init__(self, network: _Network, accuracy: float) -> None:
        self.network, self.accuracy = network.eval().requires_grad_(False), accuracy
        self.device = network.head.weight.device
        self.identity = f"classifier:{checksum(network.state_dict(), {})[:16]}"

    def to(self, device: torch.device) -> "Classifier":
        """The classifier, whose network is moved to a device.

        Args:
            device: the device.
        """
        return Classifier(self.network.to(device), self.accuracy)

    @override
    def compute(self, x: Float[Tensor, "n C H W"]) -> Float[Tensor, "n F"]:
        return torch.cat([self.network.body(part) for part in x.split(512)])

    @torch.no_grad()
    def predict(self, x: Float[Tensor, "n C H W"]) -> Int[Tensor, "n"]:
        """Most likely class of each image, on the CPU.

        Args:
            x: images in [-1, 1].

        Raises:
            ValueError: logits are not finite.
        """
        logits = torch.cat([self.network(part.float().to(self.device)) for part in x.split(512)])
        if not logits.isfinite().all():
            raise ValueError("the classifier returns logits that are not finite")
        return logits.argmax(1).cpu()

    @override
    def metadata(self) -> dict[str, str | float]:
        return super().metadata() | {"accuracy": self.accuracy}


def train_classifier(
    pool: Pool,
    *,
    seed: int = 0,
    epochs: int = _EPOCHS,
    held_out: float = 0.2,
    device: str | torch.device = "cpu",
    progress: Progress = silent,
) -> Classifier:
    """Train a classifier on a part of the pool, and measure its accuracy on the rest.

    Args:
        pool: labelled images.
        seed: seed of the split, the initial weights and the order of the images.
        epochs: passes over the training part; training also ends after 300,000 images.
        held_out: fraction of the pool that the accuracy is measured on.
        device: device to train on.
        progress: called with (done, total) images.

    Raises:
        ValueError: the pool has no labels, or does not hold images.
    """
    if pool.labels is None or len(pool.shape) != 3:
        raise ValueError(f"a classifier needs labelled images (C, H, W), not {pool}")
    order = torch.randperm(len(pool), generator=generator(seed, "classifier"))
    test, train = order.split([round(held_out * len(pool)), len(pool) - round(held_out * len(pool))])
    with torch.random.fork_rng([]):
        torch.manual_seed(derive(seed, "classifier weights"))
        network = _Network(pool.shape, pool.num_classes).to(device)
    _fit(network, pool.subset(train), seed, epochs, progress)
    return Classifier(network, _measure_accuracy(Classifier(network, 0.0), pool, test))


def cached_classifier(
    pool: Pool, *, seed: int = 0, device: str | torch.device = "cpu", progress: Progress = silent
) -> Classifier:
    """Classifier of a data set from the cache; the first call trains it.

    Args:
        pool: labelled images.
        seed: seed of the training.
        device: device of the network.
        progress: called with (done, total) training images.

    Raises:
        ValueError: the pool has no labels, or does not hold images; or the cached file is damaged.
    """

    def make(path: Path) -> None:
        classifier = train_classifier(pool, seed=seed, device=device, progress=progress)
        metadata = {"recipe": _RECIPE, "shape": json.dumps(pool.shape), "classes": str(pool.num_classes)}
        metadata["accuracy"] = repr(classifier.accuracy)
        write_tensors(path, classifier.network.state_dict(), metadata)

    return cached(_cache_name(content_hash(pool), seed), lambda path: _read(path, device), make)


def find_classifier(data: str, *, seed: int = 0, device: str | torch.device = "cpu") -> Classifier:
    """Classifier from the cache of a data set that is known by its hash alone.

    Args:
        data: hash of the data set (`content_hash`).
        seed: seed of the training.
        device: device of the network.

    Raises:
        ValueError: the cache does not hold this classifier, or its file is damaged.
    """
    classifier = _read(cache_folder() / _cache_name(data, seed), device)
    if classifier is None:
        raise ValueError(
            f"the classifier of data {data[:16] or '(hash unknown)'} was not trained on this machine; use the data as "
            "the reference instead of their statistics"
        )
    return classifier


def _cache_name(data: str, seed: int) -> str:
    return f"classifiers/{_RECIPE.rpartition(' ')[2]}-{seed}-{data[:32]}.safetensors"


def _read(path: Path, device: str | torch.device) -> Classifier | None:
    """The classifier in a file; None if there is no file."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the file is not a mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it to train the classifier again") from None
    network = _Network(tuple(json.loads(metadata["shape"])), int(metadata["classes"]))
    network.load_state_dict(state)
    return Classifier(network.to(device), float(metadata["accuracy"]))


def _fit(network: _Network, pool: Pool, seed: int, epochs: int, progress: Progress) -> None:
    device, batches = network.head.weight.device, ShuffledBatches(pool, 128, seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    total = min(epochs * len(pool), _MAX_IMAGES)
    for images in range(0, total, batches.size):
        batch = batches(images)
        assert batch.label is not None
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(batch.x.float().to(device)), batch.label.to(device)).backward()
        optimizer.step()
        progress(min(images + batches.size, total), total)


def _measure_accuracy(classifier: Classifier, pool: Pool, test: Tensor) -> float:
    assert pool.labels is not None
    correct = [classifier.predict(pool.take(part)) == pool.labels[part].cpu() for part in test.split(512)]
    return float(torch.cat(correct).double().mean())
