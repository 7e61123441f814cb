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

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import grid_sample

from stablefield.process import move, per_example

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
    """Images under an affine map, resampled on a grid of twice the resolution (Karras et al. 2020, appendix B).

    Beyond its edges an image continues by reflection at the centres of its outermost pixels. The fine grid comes from
    the sym6 wavelet's filter and is interpolated bilinearly; the same filter, reversed, precedes the dropping of every
    other pixel. The two together leave an image that is not moved as it is. The result of an image does not depend on
    the others of the batch, in any bit.

    Args:
        x: the images.
        inverse: for each image, the map from points of the result to points of the image, as `affine` returns it.
    """
    return _resampled(_fine_grid(x), inverse, (x.shape[2], x.shape[3]))


def warp_all(x: Float[Tensor, "n C H W"], inverse: Float[Tensor, "B 2 3"]) -> Float[Tensor, "B n C H W"]:
    """Every image under every map, as `warp`.

    Args:
        x: the images.
        inverse: the maps, as for `warp`.
    """
    fine = _fine_grid(x).flatten(0, 1).expand(len(inverse), -1, -1, -1)
    return _resampled(fine, inverse, (x.shape[2], x.shape[3])).unflatten(1, x.shape[:2])


def _resampled(
    fine: Float[Tensor, "B C P Q"], inverse: Float[Tensor, "B 2 3"], size: tuple[int, int]
) -> Float[Tensor, "B C H W"]:
    """Images under a map, from one period of their fine grids."""
    # points of the result, on a fine grid with the margin that the filter reads beyond the edges
    numbers = (torch.arange(_TAPS + 2 * side - 2, device=fine.device) - _BEFORE for side in size)
    lines = [number.to(inverse.dtype) / 2 - (side - 1) / 2 for number, side in zip(numbers, size, strict=True)]
    y, x = torch.meshgrid(*lines, indexing="ij")
    points = torch.stack([x, y, torch.ones_like(y)], 2)
    sources = (points[None, :, :, None] * inverse[:, None, None]).sum(4)
    sides = move(torch.tensor([size[1], size[0]], dtype=inverse.dtype), fine.device)
    last = move(torch.tensor([fine.shape[3] - 1, fine.shape[2] - 1], dtype=inverse.dtype), fine.device).clamp(min=1)
    place = (2 * sources + sides - 1).remainder(last)  # within the period
    # in grid_sample's coordinates -1 and 1 are the first and the last point of the fine grid
    sampled = grid_sample(fine, (2 * place / last - 1).to(fine), "bilinear", "border", align_corners=True)
    return _downsampled(_downsampled(sampled, 2), 3)


def _rotation(angle: Float[Tensor, "B"]) -> Float[Tensor, "B 2 2"]:
    """Rotation matrices, counter-clockwise as seen with y pointing down."""
    return _matrix(angle.cos(), angle.sin(), -angle.sin(), angle.cos())


def _matrix(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Float[Tensor, "B 2 2"]:
    return torch.stack([torch.stack([a, b], 1), torch.stack([c, d], 1)], 1)


_SYM6 = (
    *(0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466),
    *(0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578),
    *(0.0017677118642428036, -0.007800708325034148),
)  # low-pass filter of the symlet with six vanishing moments (Daubechies 1992, table 6.3)
_FILTER = tuple(weight / sum(_SYM6) for weight in _SYM6)
_TAPS = len(_FILTER)
_BEFORE = _TAPS // 2 - 1  # taps before a pixel


def _fine_grid(x: Float[Tensor, "n C H W"]) -> Float[Tensor, "n C P Q"]:
    """One period of the reflected images on a grid of twice the resolution; its first point is repeated at the end."""
    return _upsampled(_upsampled(x, 2), 3)


def _upsampled(x: Tensor, dimension: int) -> Tensor:
    """Two points for each one of the period 2 n - 2 of a reflected line, filtered, and the first once more."""
    period = max(1, 2 * x.shape[dimension] - 2)

    def reflected(offset: int) -> Tensor:
        place = (torch.arange(period, device=x.device) + offset) % period
        return x.index_select(dimension, torch.minimum(place, period - place))

    phases = [
        sum(2 * weight * reflected(ahead - k) for k, weight in enumerate(_FILTER[first::2]))
        for first, ahead in ((1, _BEFORE // 2), (0, _BEFORE // 2 + 1))
    ]
    fine = torch.stack([torch.as_tensor(phase) for phase in phases], dimension + 1).flatten(dimension, dimension + 1)
    return torch.cat([fine, fine.narrow(dimension, 0, 1)], dimension)


def _downsampled(x: Tensor, dimension: int) -> Tensor:
    """Every other point inside the margins, filtered."""
    n = x.shape[dimension] - _TAPS + 1
    terms = (weight * x.narrow(dimension, k, n).unfold(dimension, 1, 2).squeeze(-1) for k, weight in enumerate(_FILTER))
    return torch.as_tensor(sum(terms))
