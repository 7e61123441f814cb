"""A residual multilayer perceptron: for vectors, or any data small enough to be flattened."""

import math
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu

from stablefield.networks.embedding import Embedding


class MLP(nn.Module):
    """Residual layers over the flattened data, each shifted by the embedding.

    Args:
        shape: of one datum, any.
        label_dim: classes it is told of, as one-hot rows.
        augment_dim: numbers that say how a datum was augmented.
        width: features of each layer.
        layers: how many residual layers.
        dropout: share of features dropped in each.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        label_dim: int = 0,
        augment_dim: int = 0,
        width: int = 256,
        layers: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding = Embedding(width, label_dim, augment_dim)
        self.enter = nn.Linear(math.prod(shape), width)
        self.layers = nn.ModuleList(Layer(width, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, math.prod(shape))
        nn.init.zeros_(self.leave.weight)

    def forward(
        self,
        x: Float[Tensor, "B *D"],
        noise: Float[Tensor, "B"],
        label: Float[Tensor, "B L"] | None = None,
        augment: Float[Tensor, "B A"] | None = None,
    ) -> Float[Tensor, "B *D"]:
        emb = self.embedding(noise, label, augment)
        h = self.enter(x.flatten(1))
        for layer in self.layers:
            h = layer(h, emb)
        return self.leave(self.norm(h)).view(x.shape)


class Layer(nn.Module):
    """h + linear(silu(linear(norm(h)) + linear(emb)))."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first, self.told, self.second = (nn.Linear(width, width) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        return h + self.second(self.dropout(silu(self.first(self.norm(h)) + self.told(emb))))
