"""Features of a small classifier, trained on the data set's own labels.

No download is needed, and the features know what matters in these data. It is trained once and kept in the cache;
another data set, seed or recipe is another classifier, and distances in one are comparable with no other's.
"""

import json
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stablefield.checkpoint import checksum, replacing
from stablefield.data import Progress, Shuffled, content_hash, silent
from stablefield.data.store import cache_folder
from stablefield.evaluate.features import Features
from stablefield.reference import Pool
from stablefield.seeding import derive, generator

RECIPE = "stablefield classifier 1"  # counts up whenever the network or its training changes
EPOCHS, MOST_IMAGES = 30, 300_000


class Network(nn.Module):
    """Convolutions, halved until 8 pixels are left, and a layer of features, from which the class is read linearly."""

    def __init__(self, shape: tuple[int, ...], classes: int, width: int = 64) -> None:
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
        self.head = nn.Linear(width, classes)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B classes"]:
        return self.head(self.body(x))


class Classifier(Features):
    """A trained classifier.

    Attributes:
        network: asked about images in [-1, 1].
        accuracy: the share that it gets right of images it has not seen.
    """

    name = "classifier"

    def __init__(self, network: Network, accuracy: float) -> None:
        self.network, self.accuracy = network.eval().requires_grad_(False), accuracy
        self.device = network.head.weight.device
        self.identity = f"classifier:{checksum(network.state_dict(), {})[:16]}"

    def of(self, x: Float[Tensor, "n C H W"]) -> Float[Tensor, "n F"]:
        return torch.cat([self.network.body(part) for part in x.split(512)])

    @torch.no_grad()
    def predict(self, x: Float[Tensor, "n C H W"]) -> Int[Tensor, "n"]:
        """The most likely class of each image, on the CPU.

        Raises:
            ValueError: the network answers with numbers that are not finite, among which none is the largest.
        """
        answers = torch.cat([self.network(part.float().to(self.device)) for part in x.split(512)])
        if not answers.isfinite().all():
            raise ValueError("the classifier answers with numbers that are not finite")
        return answers.argmax(1).cpu()

    def about(self) -> dict[str, str | float]:
        return super().about() | {"accuracy": self.accuracy}


def train_classifier(
    pool: Pool,
    *,
    seed: int = 0,
    epochs: int = EPOCHS,
    held_out: float = 0.2,
    device: str | torch.device = "cpu",
    progress: Progress = silent,
) -> Classifier:
    """Train on a part of the pool, for at most 300,000 images, and measure on the rest.

    Raises:
        ValueError: the pool has no labels, or holds no images.
    """
    if pool.labels is None or len(pool.shape) != 3:
        raise ValueError(f"a classifier needs labelled images (C, H, W), not {pool}")
    order = torch.randperm(len(pool), generator=generator(seed, "classifier"))
    test, seen = order.split([round(held_out * len(pool)), len(pool) - round(held_out * len(pool))])
    with torch.random.fork_rng([]):
        torch.manual_seed(derive(seed, "classifier weights"))
        network = Network(pool.shape, pool.classes).to(device)
    _fit(network, pool.subset(seen), seed, epochs, progress)
    return Classifier(network, _accuracy(Classifier(network, 0.0), pool, test))


def cached_classifier(
    pool: Pool, *, seed: int = 0, device: str | torch.device = "cpu", progress: Progress = silent
) -> Classifier:
    """The classifier of these data, from the cache; trained and put there the first time.

    Raises:
        ValueError: the pool has no labels, or holds no images.
    """
    place = _place(content_hash(pool), seed)
    if place.is_file():
        return _read(place, device)
    classifier = train_classifier(pool, seed=seed, device=device, progress=progress)
    place.parent.mkdir(parents=True, exist_ok=True)
    about = {"recipe": RECIPE, "shape": json.dumps(pool.shape), "classes": str(pool.classes)}
    state = {name: tensor.cpu() for name, tensor in classifier.network.state_dict().items()}
    with replacing(place) as beside:
        save_file(state, beside, about | {"accuracy": repr(classifier.accuracy)})
    return classifier


def known_classifier(data: str, *, seed: int = 0, device: str | torch.device = "cpu") -> Classifier:
    """The classifier of data with this hash, if it was ever trained here.

    Raises:
        ValueError: it was not.
    """
    place = _place(data, seed)
    if not place.is_file():
        raise ValueError("the classifier of these statistics was not trained here: give the data they are of instead")
    return _read(place, device)


def _place(data: str, seed: int) -> Path:
    return cache_folder() / "classifiers" / f"{RECIPE.rpartition(' ')[2]}-{seed}-{data[:32]}.safetensors"


def _read(place: Path, device: str | torch.device) -> Classifier:
    try:
        with safe_open(place, "pt") as file:
            about = file.metadata()
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except SafetensorError as error:
        raise ValueError(f"{place} is damaged ({error}): remove it, and it is trained again") from None
    network = Network(tuple(json.loads(about["shape"])), int(about["classes"]))
    network.load_state_dict(state)
    return Classifier(network.to(device), float(about["accuracy"]))


def _fit(network: Network, pool: Pool, seed: int, epochs: int, progress: Progress) -> None:
    device, batches = network.head.weight.device, Shuffled(pool, 128, seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    total = min(epochs * len(pool), MOST_IMAGES)
    for images in range(0, total, batches.size):
        batch = batches(images)
        assert batch.label is not None
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(batch.x.float().to(device)), batch.label.to(device)).backward()
        optimizer.step()
        progress(min(images + batches.size, total), total)


def _accuracy(classifier: Classifier, pool: Pool, test: Tensor) -> float:
    assert pool.labels is not None
    right = [classifier.predict(pool.take(part)) == pool.labels[part].cpu() for part in test.split(512)]
    return float(torch.cat(right).double().mean())
