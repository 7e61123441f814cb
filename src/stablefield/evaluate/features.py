"""Features to judge samples by: those of a small classifier, trained on the data set's own labels.

No download is needed, and the features know what matters in these data. Distances in them are comparable only with
the same classifier, that is, the same data, seed and version.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from stablefield.data import Shuffled
from stablefield.reference import Pool
from stablefield.seeding import derive, generator


class Network(nn.Module):
    """Two convolutions and a layer of features, from which the class is read linearly."""

    def __init__(self, channels: int, classes: int, width: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveMaxPool2d(4), nn.Flatten()),
            *(nn.Linear(64 * 16, width), nn.ReLU()),
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B classes"]:
        return self.head(self.body(x))


@dataclass(frozen=True, eq=False)
class Classifier:
    """A trained classifier, and the share it gets right of images it has not seen."""

    network: Network
    accuracy: float

    @torch.no_grad()
    def features(self, x: Float[Tensor, "n C H W"]) -> Float[Tensor, "n F"]:
        """The features of images in [-1, 1]."""
        return torch.cat([self.network.body(part) for part in x.float().split(512)])

    @torch.no_grad()
    def predict(self, x: Float[Tensor, "n C H W"]) -> Int[Tensor, "n"]:
        """The most likely class of each image."""
        return torch.cat([self.network(part).argmax(1) for part in x.float().split(512)])


def train_classifier(pool: Pool, *, seed: int = 0, epochs: int = 30, held_out: float = 0.2) -> Classifier:
    """Train on a part of the pool, measure on the rest.

    Raises:
        ValueError: the pool has no labels, or holds no images.
    """
    if pool.labels is None or len(pool.shape) != 3:
        raise ValueError(f"a classifier needs labelled images (C, H, W), not {pool}")
    order = torch.randperm(len(pool), generator=generator(seed, "classifier"))
    test, seen = order.split([round(held_out * len(pool)), len(pool) - round(held_out * len(pool))])
    with torch.random.fork_rng([]):
        torch.manual_seed(derive(seed, "classifier weights"))
        network = Network(pool.shape[0], pool.classes)
    _fit(network, pool.subset(seen), seed, epochs)
    classifier = Classifier(network.eval(), 0.0)
    right = classifier.predict(pool.take(test)) == pool.labels[test]
    return Classifier(network, float(right.double().mean()))


def _fit(network: Network, pool: Pool, seed: int, epochs: int) -> None:
    batches, optimizer = Shuffled(pool, 128, seed), torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    for images in range(0, epochs * len(pool), batches.size):
        batch = batches(images)
        assert batch.label is not None
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(batch.x), batch.label).backward()
        optimizer.step()
