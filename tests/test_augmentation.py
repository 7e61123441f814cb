"""Laws of augmentation: the maps, the random parameters and labels, and one augmentation per image of a run."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stablefield import VE, IdealDenoiser, Pool, TrainState, train
from stablefield.augmentation import DIM, affine, flip, permutes, warp, warp_all
from stablefield.build import build
from stablefield.config import ConfigError, override, resolve
from stablefield.data import AugmentedBatches, EDMAugmentation, LabelDropout, Mirror, NoAugmentation, ShuffledBatches
from stablefield.data.augmentation import KINDS
from stablefield.distributed import Ranks
from stablefield.pool import NULL_LABEL
from stablefield.seeding import generator


def generators(n: int, first: int = 0) -> list[torch.Generator]:
    return [generator(0, "augmentation", number) for number in range(first, first + n)]


def maps(size: tuple[int, int], **said: float | tuple[float, float]) -> Tensor:
    """One map of which only this is said."""
    numbers = {name: torch.zeros(1, dtype=torch.float64) for name in ("scale", "angle", "stretch", "axis")}
    numbers |= {name: torch.tensor([value], dtype=torch.float64) for name, value in said.items()}
    return affine(**({"shift": torch.zeros(1, 2, dtype=torch.float64)} | numbers), size=size)


def wave(x: Tensor, y: Tensor, size: tuple[int, int]) -> Tensor:
    """An image as a function of the plane, which continues by reflection as `warp` does."""
    height, width = size
    return torch.cos(2 * torch.pi * x / (width - 1)) * torch.cos(torch.pi * y / (height - 1)) + 0.3 * torch.cos(
        torch.pi * x / (width - 1)
    )


def plane(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    y, x = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in size), indexing="ij")
    return x, y


# ---- the maps

EDM_COLUMNS = {
    "identity": [2],
    "scale": [2],
    "rotate": [3, 4],
    "aniso": [5, 6],
    "translate": [7, 8],
    "all": [2, 3, 4, 5, 6, 7, 8],
}


@pytest.mark.parametrize("kind", EDM_COLUMNS)
def test_images_equal_those_of_edm_for_equal_labels(kind: str) -> None:
    with np.load(Path(__file__).parent / "data" / "edm-augment.npz") as file:
        x, label, wanted = (torch.from_numpy(file[name]) for name in ("x", f"{kind}_label", f"{kind}_image"))
    columns = torch.zeros(len(x), DIM, dtype=torch.float64)
    columns[:, EDM_COLUMNS[kind]] = label.double()
    rotation = {"scale": columns[:, 2], "angle": torch.atan2(columns[:, 4], columns[:, 3] + 1)}
    errors = []
    for sign in (1, -1):  # a label does not tell an axis and a stretch from the opposite ones
        axis = {"stretch": sign * columns[:, 5:7].norm(dim=1), "axis": torch.atan2(*(sign * columns[:, 5:7].T.flip(0)))}
        found = warp(x, affine(**rotation, **axis, shift=columns[:, 7:], size=(32, 32)))
        errors.append((found - wanted).abs().flatten(1).amax(1))
    assert torch.minimum(*errors).max() < 1e-5


@pytest.mark.parametrize("size", [(32, 32), (7, 10), (1, 5)])
def test_the_map_of_no_strength_leaves_noise_as_it_is(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(warp(x, maps(size).expand(2, -1, -1)), x, rtol=0, atol=1e-10)


def test_every_image_under_every_map_is_each_image_under_each_map() -> None:
    x = torch.rand(3, 2, 6, 9, generator=torch.Generator().manual_seed(0))
    inverse = EDMAugmentation(p=0.7)._draw(generators(4)).inverse_maps((6, 9))
    each = [torch.cat([warp(image[None], one[None]) for image in x]) for one in inverse]
    assert torch.equal(warp_all(x, inverse), torch.stack(each))


@pytest.mark.parametrize("size", [(32, 32), (20, 36), (36, 20)])
def test_an_image_known_everywhere_is_seen_where_the_map_says(size: tuple[int, int]) -> None:
    parameters = EDMAugmentation(p=0.7)._draw(generators(40))
    x, y = plane(size)
    images = wave(x, y, size).expand(40, 1, *size)
    found = warp(images, parameters.inverse_maps(size))
    centre = torch.tensor([(size[1] - 1) / 2, (size[0] - 1) / 2], dtype=torch.float64)
    points = torch.stack([x, y], 2) - centre  # from the centre, and forward by each step of the label in turn
    for row in range(40):
        forward = torch.eye(2, dtype=torch.float64) * 2 ** (0.2 * parameters.scale[row])
        forward = turned(parameters.angle[row]) @ forward
        axis, stretch = turned(parameters.axis[row]), 0.2 * parameters.stretch[row]
        forward = axis @ torch.diag(torch.stack([2**stretch, 2**-stretch])) @ axis.T @ forward
        shift = 0.125 * parameters.shift[row] * torch.tensor([size[1], size[0]])
        source = (points - shift) @ torch.linalg.inv(forward).T + centre
        torch.testing.assert_close(found[row, 0], wave(source[..., 0], source[..., 1], size), rtol=0, atol=0.05)


def turned(angle: Tensor) -> Tensor:
    """Counter-clockwise as it is seen, in coordinates whose y runs downwards."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, sin]), torch.stack([-sin, cos])])


def smooth(size: tuple[int, int] = (24, 24)) -> Tensor:
    x, y = plane(size)
    return (torch.exp(-((x - 8) ** 2 + (y - 5) ** 2) / 18) - torch.exp(-((x - 15) ** 2 + (y - 16) ** 2) / 24))[
        None, None
    ]


def test_angles_run_counter_clockwise_shifts_right_and_down_and_growth_is_growth() -> None:
    image, size = smooth(), (24, 24)
    quarter = warp(image, maps(size, angle=math.pi / 2))
    torch.testing.assert_close(quarter, torch.rot90(image, 1, (2, 3)), rtol=0, atol=0.03)
    shifted = warp(image, maps(size, shift=(1.0, -1.0)))  # an eighth of 24: 3 to the right, 3 up
    torch.testing.assert_close(shifted[..., :-3, 3:], image[..., 3:, :-3], rtol=0, atol=0.01)
    grown = warp(image, maps(size, scale=5.0))  # twice the size: what was at 11.5 + d is at 11.5 + 2 d
    torch.testing.assert_close(
        grown[..., 1::2, 1::2][..., :12, :12], between(image)[..., 6:18, 6:18], rtol=0, atol=0.05
    )
    wide = warp(image, maps(size, stretch=5.0))
    tall = warp(image, maps(size, stretch=5.0, axis=math.pi / 2))
    torch.testing.assert_close(wide.mT, warp(image.mT, maps(size, stretch=5.0, axis=math.pi / 2)), rtol=0, atol=1e-6)
    assert wide[0, 0].abs().sum(0).gt(0.5).sum() > image[0, 0].abs().sum(0).gt(0.5).sum()
    torch.testing.assert_close(tall, warp(image, maps(size, stretch=-5.0)), rtol=0, atol=1e-6)


def between(image: Tensor) -> Tensor:
    """Values at pixels plus a quarter, by a Taylor expansion no finer than is asked for here."""
    right, down = image.roll(-1, 3), image.roll(-1, 2)
    both = right.roll(-1, 2)
    return (9 * image + 3 * right + 3 * down + both) / 16


def test_a_map_and_its_inverse_lead_back() -> None:
    image, size = smooth(), (24, 24)
    for said in ({"angle": 0.7}, {"scale": 1.3}, {"stretch": 1.1}):
        back = warp(warp(image, maps(size, **said)), maps(size, **{name: -value for name, value in said.items()}))
        torch.testing.assert_close(back[..., 6:-6, 6:-6], image[..., 6:-6, 6:-6], rtol=0, atol=0.02)


def test_shrinking_does_not_alias() -> None:
    # stripes too fine for an image of half the size become grey, not other stripes
    x, _ = plane((32, 32))
    stripes = torch.cos(torch.pi * 28 / 31 * x)[None, None]
    assert warp(stripes, maps((32, 32), scale=-5.0)).abs().max() < 0.01


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 7), (3, 5, 2), (1, 64, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_of_any_size_can_be_warped(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x = torch.full((8, *shape), 0.5, dtype=dtype)
    found, label, _ = EDMAugmentation(p=1.0)(x, generators(8))
    assert found.dtype == label.dtype == dtype
    torch.testing.assert_close(found, x)  # grey stays grey


# ---- random parameters and labels


def test_untransformed_images_keep_their_bits_and_flips_only_permute_pixels() -> None:
    x = torch.rand(400, 2, 5, 7, generator=torch.Generator().manual_seed(0))
    found, label, _ = EDMAugmentation()(x, generators(400))
    flips, permuting = label[:, :2].long(), permutes(label)
    for i in range(400):
        if permuting[i]:
            expected = x[i].flip([-1] * flips[i, 0] + [-2] * flips[i, 1])
            assert torch.equal(found[i], expected)
        else:
            assert not torch.equal(found[i], x[i])
    assert {tuple(pair) for pair in flips[permuting].tolist()} == {(0, 0), (1, 0), (0, 1), (1, 1)}
    assert torch.equal(flip(flip(x, label), label), x)


def test_every_kind_has_its_frequency_and_distribution() -> None:
    n, p = 20_000, 0.12
    parameters = EDMAugmentation(p=p)._draw(generators(n))
    label = parameters.augment_label()
    frequencies = {
        "xflip": (label[:, 0] == 1, 1 / 2),
        "yflip": (label[:, 1] == 1, p / 2),
        "scale": (label[:, 2] != 0, p),
        "rotation": (label[:, 4] != 0, p),
        "anisotropy": (label[:, 5] != 0, p),
        "turned anisotropy": (label[:, 6] != 0, p / 2),
        "translation": (label[:, 7] != 0, p),
        "not permuting": (~permutes(label), 1 - (1 - p) ** 4),
    }
    for name, (applied, share) in frequencies.items():
        error = math.sqrt(share * (1 - share) / n)
        assert abs(float(applied.double().mean()) - share) < 4.5 * error, name
    for w in (parameters.scale, parameters.stretch, parameters.shift[:, 0], parameters.shift[:, 1]):
        normal = w[w != 0]
        assert abs(float(normal.mean())) < 4.5 / math.sqrt(len(normal))
        assert abs(float(normal.var()) - 1) < 4.5 * math.sqrt(2 / len(normal))
    for angle in (parameters.angle, parameters.axis):
        uniform = angle[angle != 0]
        assert abs(float(uniform.mean())) < 4.5 * math.pi / math.sqrt(3 * len(uniform))
        assert uniform.abs().max() <= math.pi
        assert abs(float(uniform.abs().mean()) - math.pi / 2) < 4.5 * math.pi / math.sqrt(12 * len(uniform))


def test_labels_contain_the_parameters() -> None:
    parameters = EDMAugmentation(p=0.6)._draw(generators(200))
    label = parameters.augment_label()
    assert label.shape == (200, DIM)
    assert torch.equal(label[:, :3], torch.cat([parameters.flips, parameters.scale[:, None]], 1))
    torch.testing.assert_close(torch.atan2(label[:, 4], label[:, 3] + 1), parameters.angle)
    torch.testing.assert_close(label[:, 5:7].norm(dim=1), parameters.stretch.abs())
    torch.testing.assert_close(label[:, 6] * parameters.axis.cos(), label[:, 5] * parameters.axis.sin())
    assert torch.equal(label[:, 7:], parameters.shift)


@pytest.mark.parametrize("kind", KINDS)
def test_leaving_out_a_kind_does_not_change_the_others(kind: str) -> None:
    whole = EDMAugmentation(p=0.5)._draw(generators(100)).augment_label()
    single = EDMAugmentation(p=0.5, kinds=(kind,))._draw(generators(100)).augment_label()
    column = {"xflip": [0], "yflip": [1], "scale": [2], "rotation": [3, 4], "anisotropy": [5, 6]}.get(kind, [7, 8])
    others = [c for c in range(DIM) if c not in column]
    assert torch.equal(single[:, column], whole[:, column])
    assert single[:, column].any()
    assert not single[:, others].any()


def labelled_pool(n: int = 24) -> Pool:
    g = torch.Generator().manual_seed(n)
    return Pool(torch.randn(n, 1, 6, 4, generator=g), torch.arange(n) % 3)


def augmented_with_label_dropout(rank: int, world_size: int, size: int = 16) -> LabelDropout:
    order = ShuffledBatches(labelled_pool(), size, seed=4, rank=rank, world_size=world_size)
    return LabelDropout(AugmentedBatches(order, EDMAugmentation(p=0.4), 4), 0.3, 4)


def test_two_ranks_together_see_the_batch_of_one() -> None:
    whole = augmented_with_label_dropout(0, 1)(32)
    halves = [augmented_with_label_dropout(rank, 2)(32) for rank in range(2)]
    for name in ("x", "index", "image_number", "label", "augment_label"):
        assert torch.equal(torch.cat([getattr(half, name) for half in halves]), getattr(whole, name)), name
    assert (whole.label == NULL_LABEL).any()
    assert whole.augment_label.any()


def test_the_augmentation_of_an_image_depends_only_on_its_number() -> None:
    one, other = augmented_with_label_dropout(0, 1, 16)(16), augmented_with_label_dropout(0, 1, 8)(24)
    assert torch.equal(one.x[8:], other.x)
    assert torch.equal(one.augment_label[8:], other.augment_label)
    assert torch.equal(one.label[8:], other.label)


def test_labels_are_dropped_with_the_given_probability_and_otherwise_kept() -> None:
    order = ShuffledBatches(labelled_pool(), 5000, seed=1)
    plain, dropped_out = order(0), LabelDropout(order, 0.3, 1)(0)
    null = dropped_out.label == NULL_LABEL
    assert abs(float(null.double().mean()) - 0.3) < 4.5 * math.sqrt(0.3 * 0.7 / 5000)
    assert torch.equal(dropped_out.label[~null], plain.label[~null])
    assert torch.equal(LabelDropout(order, 0.0, 1)(0).label, plain.label)
    assert (LabelDropout(order, 1.0, 1)(0).label == NULL_LABEL).all()


def test_the_ideal_denoiser_of_flipped_data_is_the_flipped_ideal_denoiser() -> None:
    pool, augment_label = labelled_pool(), torch.zeros(5, DIM)
    augment_label[1, 0] = augment_label[2, 1] = augment_label[3, 0] = augment_label[3, 1] = 1
    flipped = [Pool(flip(pool.data, flips.expand(len(pool), -1)), pool.labels) for flips in augment_label]
    x_t, t = torch.randn(5, 1, 6, 4, generator=torch.Generator().manual_seed(0)), torch.full((5,), 0.8)
    label = torch.tensor([0, 1, 2, 0, NULL_LABEL])
    expected = torch.cat([IdealDenoiser(p, VE())(*(v[[k]] for v in (x_t, t, label))) for k, p in enumerate(flipped)])
    torch.testing.assert_close(IdealDenoiser(pool, VE())(x_t, t, label, augment_label), expected)
    augment_label[0, 7] = 0.3
    with pytest.raises(ValueError, match="flips only"):
        IdealDenoiser(pool, VE())(x_t, t, label, augment_label)


# ---- in a run


SMALL = {"network": {"channels": 8}, "target": {"kind": "stf", "references": "recent", "size": 32}}
EVERYTHING = SMALL | {
    "augmentation": {"kind": "edm", "p": 0.3},
    "training": {"conditional": True, "label_dropout": 0.2, "batch_size": 16, "learning_rate_warmup": 0},
    "data": {"holdout": 97},
}


@pytest.mark.usefixtures("unchecked")
def test_an_augmented_conditional_run_resumes_bit_for_bit_and_ranks_share_its_batches() -> None:
    def losses(state: TrainState, images: int) -> list[float]:
        parts = build(resolve(EVERYTHING))
        steps = train(state, parts.objective, parts.batches, images=images, seed=0)
        return [step.report.loss.item() for step in steps]

    whole = losses(TrainState(build(resolve(EVERYTHING)).denoiser), 96)
    state = TrainState(build(resolve(EVERYTHING)).denoiser)
    assert losses(state, 48) + losses(state, 96) == whole  # with new components: the recent references are read again
    assert len(whole) == 6
    parts = [build(resolve(EVERYTHING), ranks=Ranks(torch.device("cpu"), rank, 2)) for rank in range(2)]
    together = torch.cat([p.batches(16).x for p in parts])
    assert torch.equal(together, build(resolve(EVERYTHING)).batches(16).x)


@pytest.mark.parametrize("network", [{"kind": "unet", "channels": 8}, {"kind": "mlp"}, {"kind": "ddpmpp"}])
def test_the_augment_dim_of_a_network_follows_from_the_augmentation(network: dict) -> None:
    with_label = resolve({"network": network, "augmentation": {"kind": "edm"}})
    without_label = resolve({"network": network, "augmentation": {"kind": "mirror"}})
    assert (with_label.sections["network"]["augment_dim"], without_label.sections["network"]["augment_dim"]) == (DIM, 0)
    # a network with an input for the augmentation label, as published ones have, may be trained without
    assert resolve({"network": network | {"augment_dim": DIM}}).sections["network"]["augment_dim"] == DIM


def refused(raw: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        build(resolve(raw, allow=[NoiseOnly]))


class NoiseOnly(nn.Module):
    """A network that is conditioned on the noise level only."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.usefixtures("unchecked")
def test_settings_that_do_not_fit_together_are_refused() -> None:
    before = resolve({}).sections
    refused(
        override(before, ["augmentation.kind=edm"]),
        "augment_dim: .* labels of length 9, but the network takes 0",
    )
    refused({"augmentation": {"kind": "edm"}, "network": {"kind": f"{__name__}:NoiseOnly"}}, "network fails")
    refused({"augmentation": {"kind": "edm", "p": 1.5}}, "p is a probability between 0 and 1, not 1.5")
    refused({"augmentation": {"kind": "edm", "kinds": ["xflip", "shear"]}}, "augmentation.kinds.1: .*'shear'")
    refused({"augmentation": {"kind": "flip"}}, "'flip' is none of none, mirror, edm")
    refused({"training": {"label_dropout": 0.1}}, "needs labels to drop")
    refused({"training": {"label_dropout": 1.1, "conditional": True}}, "is a probability between 0 and 1, not 1.1")
    refused({"target": {"kind": "knn", "neighbours": 2000}}, "between 1 and the pool's 1797 data points, not 2000")
    for augmentation in (EDMAugmentation(), Mirror()):
        with pytest.raises(ValueError, match=r"only images \(C, H, W\)"):
            augmentation.augment_pool(Pool(torch.zeros(4, 3)))
    pool = labelled_pool()
    assert NoAugmentation().augment_pool(pool) is pool


def test_augmentation_and_label_dropout_depend_on_the_seed_of_the_run_only() -> None:
    def depends_on_seed(draw: Callable[[int], Tensor]) -> bool:
        return torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))

    order = ShuffledBatches(labelled_pool(), 64)
    assert depends_on_seed(lambda seed: AugmentedBatches(order, EDMAugmentation(), seed)(0).augment_label)
    assert depends_on_seed(lambda seed: LabelDropout(order, 0.5, seed)(0).label)
