"""Augmentation maps and their labels: nine numbers that describe how an image was transformed.

| columns | transformation                                                 | numbers                    |
|---------|----------------------------------------------------------------|----------------------------|
| 0, 1    | flip of the last dimension (x), of the one before (y)          | 0 or 1                     |
| 2       | scaling of both sides by 2^(0.2 w)                             | w                          |
| 3, 4    | rotation by a                                                  | cos a - 1, sin a           |
| 5, 6    | 2^(0.2 w) along an axis rotated by r, 2^(-0.2 w) across it     | w cos r, w sin r           |
| 7, 8    | shift by 0.125 (w_x, w_y) of the width and height              | w_x, w_y                   |

These are the labels of Karras et al. 2022, appendix F.2. The transformations are applied in this order; zero means
"not applied". Angles run counter-clockwise as an image is seen. (Columns 5 and 6 are equal for (w, r) and
(-w, r + pi), which stretch differently; the published labels have this ambiguity.)

Why they matter to targets: a network that is given the label learns E[x | x_t, label], so its references must be seen
through the same map. A map that only permutes pixels (columns 0 and 1) can be undone at no cost.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import grid_sample

from stablefield.process import move, per_example

__all__ = ["DIM", "affine", "flip", "permutes", "warp"]

DIM = 9  # columns of a label
_FLIPS = ((0, -1), (1, -2))  # columns of the label, and the dimensions that they flip


def permutes(augment_label: Float[Tensor, "B A"]) -> Bool[Tensor, "B"]:
    """Mask of the examples whose pixels were only permuted, or not transformed at all.

    Their targets can use the references of the data set.

    Args:
        augment_label: the label of each example.

    Raises:
        ValueError: the labels do not have nine columns, so that their meaning is not known.
    """
    if augment_label.shape[1] != DIM:
        raise ValueError(
            f"augment_label must have {DIM} columns (see stablefield.augmentation), not "
            f"{augment_label.shape[1]}; only DSM targets accept other labels"
        )
    return (augment_label[:, len(_FLIPS) :] == 0).all(1)


def flip(x: Float[Tensor, "B C H W"], augment_label: Float[Tensor, "B 9"]) -> Float[Tensor, "B C H W"]:
    """Flip images as their labels say. Flipping twice restores them, so this also undoes the flips.

    Args:
        x: the images.
        augment_label: the label of each image; only columns 0 and 1 are used.

    Raises:
        ValueError: the data are not images (C, H, W).
    """
    if x.ndim != 4:
        raise ValueError(f"only images (C, H, W) can be augmented, not data of shape {tuple(x.shape[1:])}")
    for column, dimension in _FLIPS:
        flipped = move(per_example(augment_label[:, column] != 0, x), x.device)
        x = torch.where(flipped, x.flip(dimension), x)
    return x


def affine(
    *,
    scale: Float[Tensor, "B"],
    angle: Float[Tensor, "B"],
    stretch: Float[Tensor, "B"],
    axis: Float[Tensor, "B"],
    shift: Float[Tensor, "B 2"],
    size: tuple[int, int],
) -> Float[Tensor, "B 2 3"]:
    """Inverse of the affine map that follows the flips, as a matrix [A | b].

    Args:
        scale: w of the scaling.
        angle: a of the rotation, in radians.
        stretch: w of the anisotropic scaling.
        axis: r of the anisotropic scaling, in radians.
        shift: (w_x, w_y) of the shift.
        size: (height, width) of the image.

    Returns:
        The map from each point of the result to the point of the image that is seen there. Points are (x, y) in
        pixels from the centre, y pointing down.
    """
    sides = torch.tensor([size[1], size[0]]).to(shift)
    along, across = 2 ** (0.2 * stretch), 2 ** (-0.2 * stretch)
    zero = torch.zeros_like(scale)
    anisotropic = _rotation(axis) @ _matrix(along, zero, zero, across) @ _rotation(-axis)
    forward = anisotropic @ _rotation(angle) * 2 ** (0.2 * scale)[:, None, None]
    inverse = torch.linalg.inv(forward)
    return torch.cat([inverse, -inverse @ (0.125 * shift * sides)[:, :, None]], 2)


def warp(x: Float[Tensor, "B C H W"], inverse: Float[Tensor, "B 2 3"]) -> Float[Tensor, "B C H W"]:
    """Images under an affine map, resampled on a grid of twice the resolution.

    Beyond its edges an image continues by reflection at the centres of its outermost pixels. Values halfway between
    pixels come from the maximally flat half-band filter of 12 taps (Deslauriers & Dubuc 1989; the autocorrelation of
    the sym6 wavelet's filter), the fine grid is interpolated bilinearly, and the result is filtered again before every
    other pixel is dropped. The result of an image does not depend on the others of the batch, in any bit.

    Args:
        x: the images.
        inverse: for each image, the map from points of the result to points of the image, as `affine` returns it.
    """
    height, width = x.shape[2:]
    fine = _upsampled(_upsampled(x, 2), 3)
    # points of the result on the fine grid, with the margin that the filter reads beyond the edges
    numbers = (torch.arange(-_MARGIN, 2 * side - 1 + _MARGIN, device=x.device) for side in (height, width))
    lines = [
        number.to(inverse.dtype) / 2 - (side - 1) / 2 for number, side in zip(numbers, (height, width), strict=True)
    ]
    y_points, x_points = torch.meshgrid(*lines, indexing="ij")
    points = torch.stack([x_points, y_points, torch.ones_like(y_points)], 2)
    sources = (points[None, :, :, None] * inverse[:, None, None]).sum(4)
    # in grid_sample's coordinates -1 and 1 are the centres of the outermost pixels; a side of one pixel needs no scale
    half = move(torch.tensor([max(width - 1, 1), max(height - 1, 1)], dtype=inverse.dtype), x.device) / 2
    sampled = grid_sample(fine, (sources / half).to(fine), "bilinear", "reflection", align_corners=True)
    return _downsampled(_downsampled(sampled, 2), 3)


def _rotation(angle: Float[Tensor, "B"]) -> Float[Tensor, "B 2 2"]:
    """Rotation matrices, counter-clockwise as seen with y pointing down."""
    return _matrix(angle.cos(), angle.sin(), -angle.sin(), angle.cos())


def _matrix(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Float[Tensor, "B 2 2"]:
    return torch.stack([torch.stack([a, b], 1), torch.stack([c, d], 1)], 1)


def _halfway_weights(reach: int) -> list[float]:
    """Lagrange weights of the points at 1/2, 3/2, ... on either side, for the value halfway between the nearest."""
    points = [k + 0.5 for k in range(reach)]
    return [math.prod(q**2 / (q**2 - p**2) for q in points if q != p) / 2 for p in points]


_REACH = 6  # taps on either side of the filter
_HALFWAY = _halfway_weights(_REACH)
_MARGIN = 2 * _REACH - 1  # points of the fine grid that the filter reads on either side


def _upsampled(x: Tensor, dimension: int) -> Tensor:
    """From n points to 2 n - 1: the n points, and the values halfway between them."""
    n = x.shape[dimension]
    if n == 1:
        return x
    place = torch.arange(-_REACH + 1, n - 1 + _REACH, device=x.device) % (2 * n - 2)
    extended = x.index_select(dimension, torch.minimum(place, 2 * n - 2 - place))
    first = _REACH - 1  # position of the first point of x
    pairs = [
        weight * (extended.narrow(dimension, first - k, n - 1) + extended.narrow(dimension, first + k + 1, n - 1))
        for k, weight in enumerate(_HALFWAY)
    ]
    both = torch.stack([x.narrow(dimension, 0, n - 1), sum(pairs[1:], pairs[0])], dimension + 1).flatten(
        dimension, dimension + 1
    )
    return torch.cat([both, x.narrow(dimension, n - 1, 1)], dimension)


def _downsampled(x: Tensor, dimension: int) -> Tensor:
    """Every other point inside the margins, filtered: half the point itself, half the filter of its neighbours."""
    n = x.shape[dimension] - 2 * _MARGIN

    def every_other(offset: int) -> Tensor:
        return x.narrow(dimension, _MARGIN + offset, n).unfold(dimension, 1, 2).squeeze(-1)

    pairs = ((2 * k + 1, weight) for k, weight in enumerate(_HALFWAY))
    return every_other(0) / 2 + sum(weight / 2 * (every_other(-k) + every_other(k)) for k, weight in pairs)
