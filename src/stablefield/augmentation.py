"""How an image was transformed, in nine numbers that a network can be told (the labels of Karras et al. 2022, F.2).

| columns | transformation                                                 | numbers                    |
|---------|----------------------------------------------------------------|----------------------------|
| 0, 1    | flip of the last dimension (x), of the one before (y)          | 0 or 1                     |
| 2       | all sides times 2^(0.2 w)                                      | w                          |
| 3, 4    | rotation by a                                                  | cos a - 1, sin a           |
| 5, 6    | 2^(0.2 w) along an axis turned by r, 2^(-0.2 w) across it      | w cos r, w sin r           |
| 7, 8    | shift by 0.125 (w_x, w_y) of the width and height              | w_x, w_y                   |

Zero is "not applied", and they are applied in this order. Angles run counter-clockwise as an image is seen. (Columns 5
and 6 do not tell (w, r) from (-w, r + pi), which stretch the other way: so it was published.)

Why they matter to targets: a network that is told the label learns E[x | x_t, label], so its references must be seen
through the same map. Where the map only permutes pixels (columns 0 and 1) it can be undone, which costs nothing.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import grid_sample

from stablefield.process import per_row

DIM = 9
FLIPS = ((0, -1), (1, -2))  # columns, and the dimensions that they flip


def permutes(augmentation: Float[Tensor, "B A"]) -> Bool[Tensor, "B"]:
    """Which rows were transformed by permuting their pixels, or not at all: their references can be shared.

    Raises:
        ValueError: labels of another length, whose meaning is not known.
    """
    if augmentation.shape[1] != DIM:
        raise ValueError(
            f"augmentation labels have {DIM} numbers (see stablefield.augmentation), not {augmentation.shape[1]}; "
            "only single-sample targets need not understand them"
        )
    return (augmentation[:, len(FLIPS) :] == 0).all(1)


def flip(x: Float[Tensor, "B C H W"], augmentation: Float[Tensor, "B 9"]) -> Float[Tensor, "B C H W"]:
    """The flips that the labels speak of. Twice is not at all: this undoes them too.

    Raises:
        ValueError: these are no images.
    """
    if x.ndim != 4:
        raise ValueError(f"only images (C, H, W) can be augmented, not {tuple(x.shape[1:])}")
    for column, dimension in FLIPS:
        flipped = per_row(augmentation[:, column] != 0, x).to(x.device)
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
    """What comes after the flips, as the map from points of an image to those it comes from.

    Points are (x, y) in pixels from the centre, y downwards.

    Args:
        scale: w of the scaling.
        angle: a of the rotation, in radians.
        stretch: w of the stretching along an axis.
        axis: its r, in radians.
        shift: (w_x, w_y).
        size: (height, width) of the image.
    """
    sides = torch.tensor([size[1], size[0]]).to(shift)
    along, across = 2 ** (0.2 * stretch), 2 ** (-0.2 * stretch)
    zero = torch.zeros_like(scale)
    stretched = _turn(axis) @ _matrix(along, zero, zero, across) @ _turn(-axis)
    forward = stretched @ _turn(angle) * 2 ** (0.2 * scale)[:, None, None]
    back = torch.linalg.inv(forward)
    return torch.cat([back, -back @ (0.125 * shift * sides)[:, :, None]], 2)


def warp(x: Float[Tensor, "B C H W"], back: Float[Tensor, "B 2 3"]) -> Float[Tensor, "B C H W"]:
    """Images under an affine map, seen on a grid twice as fine on the way.

    Beyond its edges an image is continued by reflection at the centres of its outermost pixels. Pixels halfway
    between others come from the maximally flat half-band filter of 12 taps (Deslauriers & Dubuc 1989; it is the
    autocorrelation of the sym6 wavelet's), the fine grid is read bilinearly, and what comes out passes the same filter
    before every other pixel is dropped. No row's result depends on other
    rows, not in a bit.

    Args:
        back: for each row, from points of the result to those they come from, as `affine` gives it.
    """
    height, width = x.shape[2:]
    fine = _double(_double(x, 2), 3)
    # points of the result on the fine grid, and as far beyond the edges as the filter looks
    ends = [torch.arange(-MARGIN, 2 * side - 1 + MARGIN) / 2 - (side - 1) / 2 for side in (height, width)]
    y, x_ = torch.meshgrid(*(end.to(back) for end in ends), indexing="ij")
    points = torch.stack([x_, y, torch.ones_like(y)], 2)
    from_ = (points[None, :, :, None] * back[:, None, None]).sum(4)
    # as grid_sample counts: -1 and 1 are the centres of the outermost pixels (any number will do if there is but one)
    half = torch.tensor([max(width - 1, 1), max(height - 1, 1)]).to(back) / 2
    read = grid_sample(fine, (from_ / half).to(fine), "bilinear", "reflection", align_corners=True)
    return _halve(_halve(read, 2), 3)


def _turn(angle: Float[Tensor, "B"]) -> Float[Tensor, "B 2 2"]:
    return _matrix(angle.cos(), angle.sin(), -angle.sin(), angle.cos())


def _matrix(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Float[Tensor, "B 2 2"]:
    return torch.stack([torch.stack([a, b], 1), torch.stack([c, d], 1)], 1)


def _halfway(reach: int) -> list[float]:
    """Lagrange's weights of the points at 1/2, 3/2, ... on either side, for the value halfway between the nearest."""
    points = [k + 0.5 for k in range(reach)]
    return [math.prod(q**2 / (q**2 - p**2) for q in points if q != p) / 2 for p in points]


REACH = 6
HALFWAY = _halfway(REACH)
MARGIN = 2 * REACH - 1  # of the filter on the fine grid, on either side


def _double(x: Tensor, dimension: int) -> Tensor:
    """2 n - 1 points where n were: the old ones, and those halfway between."""
    n = x.shape[dimension]
    if n == 1:
        return x
    place = torch.arange(-REACH + 1, n - 1 + REACH, device=x.device) % (2 * n - 2)
    beyond = x.index_select(dimension, torch.minimum(place, 2 * n - 2 - place))
    middle = REACH - 1  # where the old first point stands
    pairs = [
        weight * (beyond.narrow(dimension, middle - k, n - 1) + beyond.narrow(dimension, middle + k + 1, n - 1))
        for k, weight in enumerate(HALFWAY)
    ]
    both = torch.stack([x.narrow(dimension, 0, n - 1), sum(pairs[1:], pairs[0])], dimension + 1).flatten(
        dimension, dimension + 1
    )
    return torch.cat([both, x.narrow(dimension, n - 1, 1)], dimension)


def _halve(x: Tensor, dimension: int) -> Tensor:
    """Every other point, without the margins: half of itself, and half of what its neighbours make of it."""
    n = x.shape[dimension] - 2 * MARGIN

    def every_other(offset: int) -> Tensor:
        return x.narrow(dimension, MARGIN + offset, n).unfold(dimension, 1, 2).squeeze(-1)

    pairs = ((2 * k + 1, weight) for k, weight in enumerate(HALFWAY))
    return every_other(0) / 2 + sum(weight / 2 * (every_other(-k) + every_other(k)) for k, weight in pairs)
