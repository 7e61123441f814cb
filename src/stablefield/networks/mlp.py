"""Residual multilayer perceptron, for vectors or any data small enough to be flattened."""

import math
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu
from typing_extensions import override

from stablefield.networks.layers import Embedding, check_counts


class MLP(nn.Module):
    """Residual layers over the flattened data, each shifted by the embedding.

    Args:
        shape: shape of one data point, with any number of dimensions.
        num_classes: number of classes, 0 for a network without labels.
        augment_dim: length of the augmentation label, 0 for a network without one.
        width: features of each layer.
        layers: number of residual layers.
        dropout: probability of dropping a feature in each layer.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        num_classes: int = 0,
        augment_dim: int = 0,
        width: int = 256,
        layers: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_counts(2**16, width=width)
        check_counts(1024, layers=layers)
        self.embedding = Embedding(width, num_classes, augment_dim)
        self.enter = nn.Linear(math.prod(shape), width)
        self.layers = nn.ModuleList(Layer(width, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, math.prod(shape))
        nn.init.zeros_(self.leave.weight)

    @override
    def forward(
        self,
        x: Float[Tensor, "B *D"],
        c_noise: Float[Tensor, "B"],
        label_one_hot: Float[Tensor, "B L"] | None = None,
        augment_label: Float[Tensor, "B A"] | None = None,
    ) -> Float[Tensor, "B *D"]:
        """Output of the network before preconditioning, with the shape of x.

        Args:
            x: noisy input, scaled to unit variance (c_in x_t).
            c_noise: noise level as the network sees it, one value per example.
            label_one_hot: one-hot labels; a row of zeros, or None for all, is the null label.
            augment_label: augmentation labels; zeros, or None for all, mean that no augmentation was applied.
        """
        emb = self.embedding(c_noise, label_one_hot, augment_label)
        h = self.enter(x.flatten(1))
        for layer in self.layers:
            h = layer(h, emb)
        return self.leave(self.norm(h)).view(x.shape)


class Layer(nn.Module):
    """Residual layer h + linear(silu(linear(norm(h)) + linear(emb))).

    Args:
        width: features, and length of the embedding.
        dropout: probability of dropping a feature.
    """

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first, self.shift, self.second = (nn.Linear(width, width) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    @override
    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        return h + self.second(self.dropout(silu(self.first(self.norm(h)) + self.shift(emb))))
