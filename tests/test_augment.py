"""Laws of augmentation: what is done to images, what is told of it, and that each image of a run has its own."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from stablefield import VE, Ideal, Pool, TrainState, train
from stablefield.augmentation import DIM, affine, flip, permutes, warp
from stablefield.config import ConfigError, override, resolve
from stablefield.data import Augmented, EDMAugmentation, LabelDropout, Mirror, Plain, Shuffled
from stablefield.data.augment import KINDS
from stablefield.ranks import Ranks
from stablefield.reference import ALL
from stablefield.run import assemble
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


@pytest.mark.parametrize("size", [(32, 32), (20, 36), (36, 20)])
def test_an_image_known_everywhere_is_seen_where_the_map_says(size: tuple[int, int]) -> None:
    drawn = EDMAugmentation(p=0.7).draw(generators(40))
    x, y = plane(size)
    images = wave(x, y, size).expand(40, 1, *size)
    found = warp(images, drawn.back(size))
    centre = torch.tensor([(size[1] - 1) / 2, (size[0] - 1) / 2], dtype=torch.float64)
    points = torch.stack([x, y], 2) - centre  # from the centre, and forward by each step of the label in turn
    for row in range(40):
        forward = torch.eye(2, dtype=torch.float64) * 2 ** (0.2 * drawn.scale[row])
        forward = turned(drawn.angle[row]) @ forward
        axis, stretch = turned(drawn.axis[row]), 0.2 * drawn.stretch[row]
        forward = axis @ torch.diag(torch.stack([2**stretch, 2**-stretch])) @ axis.T @ forward
        shift = 0.125 * drawn.shift[row] * torch.tensor([size[1], size[0]])
        source = (points - shift) @ torch.linalg.inv(forward).T + centre
        torch.testing.assert_close(found[row, 0], wave(source[..., 0], source[..., 1], size), rtol=0, atol=0.02)


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
    torch.testing.assert_close(quarter, torch.rot90(image, 1, (2, 3)), rtol=0, atol=0.01)
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
    found, label = EDMAugmentation(p=1.0)(x, generators(8))
    assert found.dtype == label.dtype == dtype
    torch.testing.assert_close(found, x)  # grey stays grey


# ---- what is drawn, and what is told


def test_what_is_not_transformed_stays_bit_for_bit_and_flips_move_pixels_only() -> None:
    x = torch.rand(400, 2, 5, 7, generator=torch.Generator().manual_seed(0))
    found, label = EDMAugmentation()(x, generators(400))
    flips, told = label[:, :2].long(), permutes(label)
    for row in range(400):
        if told[row]:
            by_hand = x[row].flip([-1] * flips[row, 0] + [-2] * flips[row, 1])
            assert torch.equal(found[row], by_hand)
        else:
            assert not torch.equal(found[row], x[row])
    assert {tuple(row) for row in flips[told].tolist()} == {(0, 0), (1, 0), (0, 1), (1, 1)}
    assert torch.equal(flip(flip(x, label), label), x)


def test_every_kind_comes_as_often_as_it_should() -> None:
    n, p = 20_000, 0.12
    drawn = EDMAugmentation(p=p).draw(generators(n))
    label = drawn.label()
    nonzero = {
        "xflip": (label[:, 0] == 1, 1 / 2),
        "yflip": (label[:, 1] == 1, p / 2),
        "scale": (label[:, 2] != 0, p),
        "rotation": (label[:, 4] != 0, p),
        "anisotropy": (label[:, 5] != 0, p),
        "turned anisotropy": (label[:, 6] != 0, p / 2),
        "translation": (label[:, 7] != 0, p),
        "not permuting": (~permutes(label), 1 - (1 - p) ** 4),
    }
    for name, (happened, share) in nonzero.items():
        error = math.sqrt(share * (1 - share) / n)
        assert abs(float(happened.double().mean()) - share) < 4.5 * error, name
    for w in (drawn.scale, drawn.stretch, drawn.shift[:, 0], drawn.shift[:, 1]):
        normal = w[w != 0]
        assert abs(float(normal.mean())) < 4.5 / math.sqrt(len(normal))
        assert abs(float(normal.var()) - 1) < 4.5 * math.sqrt(2 / len(normal))
    for angle in (drawn.angle, drawn.axis):
        uniform = angle[angle != 0]
        assert abs(float(uniform.mean())) < 4.5 * math.pi / math.sqrt(3 * len(uniform))
        assert uniform.abs().max() <= math.pi
        assert abs(float(uniform.abs().mean()) - math.pi / 2) < 4.5 * math.pi / math.sqrt(12 * len(uniform))


def test_labels_say_what_was_drawn() -> None:
    drawn = EDMAugmentation(p=0.6).draw(generators(200))
    label = drawn.label()
    assert label.shape == (200, DIM)
    assert torch.equal(label[:, :3], torch.cat([drawn.flips, drawn.scale[:, None]], 1))
    torch.testing.assert_close(torch.atan2(label[:, 4], label[:, 3] + 1), drawn.angle)
    torch.testing.assert_close(label[:, 5:7].norm(dim=1), drawn.stretch.abs())
    torch.testing.assert_close(label[:, 6] * drawn.axis.cos(), label[:, 5] * drawn.axis.sin())
    assert torch.equal(label[:, 7:], drawn.shift)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_that_is_left_out_leaves_the_others_as_they_are(kind: str) -> None:
    whole = EDMAugmentation(p=0.5).draw(generators(100)).label()
    alone = EDMAugmentation(p=0.5, kinds=(kind,)).draw(generators(100)).label()
    column = {"xflip": [0], "yflip": [1], "scale": [2], "rotation": [3, 4], "anisotropy": [5, 6]}.get(kind, [7, 8])
    others = [c for c in range(DIM) if c not in column]
    assert torch.equal(alone[:, column], whole[:, column])
    assert alone[:, column].any()
    assert not alone[:, others].any()


def labelled(n: int = 24) -> Pool:
    g = torch.Generator().manual_seed(n)
    return Pool(torch.randn(n, 1, 6, 4, generator=g), torch.arange(n) % 3)


def dropped_and_augmented(rank: int, ranks: int, size: int = 16) -> LabelDropout:
    order = Shuffled(labelled(), size, seed=4, rank=rank, ranks=ranks)
    return LabelDropout(Augmented(order, EDMAugmentation(p=0.4), 4), 0.3, 4)


def test_two_ranks_see_together_what_one_sees() -> None:
    whole = dropped_and_augmented(0, 1)(32)
    halves = [dropped_and_augmented(rank, 2)(32) for rank in range(2)]
    for name in ("x", "index", "number", "label", "augmentation"):
        assert torch.equal(torch.cat([getattr(half, name) for half in halves]), getattr(whole, name)), name
    assert (whole.label == ALL).any()
    assert whole.augmentation.any()


def test_what_befalls_an_image_depends_on_its_number_alone() -> None:
    one, other = dropped_and_augmented(0, 1, 16)(16), dropped_and_augmented(0, 1, 8)(24)
    assert torch.equal(one.x[8:], other.x)
    assert torch.equal(one.augmentation[8:], other.augmentation)
    assert torch.equal(one.label[8:], other.label)


def test_labels_are_dropped_as_often_as_is_said_and_otherwise_kept() -> None:
    order = Shuffled(labelled(), 5000, seed=1)
    plain, found = order(0), LabelDropout(order, 0.3, 1)(0)
    gone = found.label == ALL
    assert abs(float(gone.double().mean()) - 0.3) < 4.5 * math.sqrt(0.3 * 0.7 / 5000)
    assert torch.equal(found.label[~gone], plain.label[~gone])
    assert torch.equal(LabelDropout(order, 0.0, 1)(0).label, plain.label)
    assert (LabelDropout(order, 1.0, 1)(0).label == ALL).all()


def test_the_exact_denoiser_of_flipped_data_is_the_flipped_exact_denoiser() -> None:
    pool, label = labelled(), torch.zeros(5, DIM)
    label[1, 0] = label[2, 1] = label[3, 0] = label[3, 1] = 1
    flipped = [Pool(flip(pool.data, row.expand(len(pool), -1)), pool.labels) for row in label]
    x_t, t = torch.randn(5, 1, 6, 4, generator=torch.Generator().manual_seed(0)), torch.full((5,), 0.8)
    told = torch.tensor([0, 1, 2, 0, ALL])
    wanted = torch.cat([Ideal(p, VE())(*(v[[k]] for v in (x_t, t, told))) for k, p in enumerate(flipped)])
    torch.testing.assert_close(Ideal(pool, VE())(x_t, t, told, label), wanted)
    label[0, 7] = 0.3
    with pytest.raises(ValueError, match="flips only"):
        Ideal(pool, VE())(x_t, t, told, label)


# ---- in a run


SMALL = {"network": {"channels": 8}, "target": {"kind": "rolling", "size": 32}}
ALL_OF_IT = SMALL | {
    "augmentation": {"kind": "edm", "p": 0.3},
    "training": {"conditional": True, "label_dropout": 0.2, "batch_size": 16, "ramp": 0},
    "data": {"holdout": 97},
}


@pytest.mark.usefixtures("unchecked")
def test_a_run_with_all_of_it_goes_on_as_if_it_had_not_stopped_and_ranks_share_its_batches() -> None:
    def losses(state: TrainState, images: int) -> list[float]:
        parts = assemble(resolve(ALL_OF_IT))
        steps = train(state, parts.objective, parts.batches, images=images, seed=0)
        return [step.report.loss.item() for step in steps]

    whole = losses(TrainState(assemble(resolve(ALL_OF_IT)).denoiser), 96)
    state = TrainState(assemble(resolve(ALL_OF_IT)).denoiser)
    assert losses(state, 48) + losses(state, 96) == whole  # with parts made anew: what a bank held is read again
    assert len(whole) == 6
    parts = [assemble(resolve(ALL_OF_IT), ranks=Ranks(torch.device("cpu"), rank, 2)) for rank in range(2)]
    together = torch.cat([p.batches(16).x for p in parts])
    assert torch.equal(together, assemble(resolve(ALL_OF_IT)).batches(16).x)


@pytest.mark.parametrize("network", [{"kind": "unet", "channels": 8}, {"kind": "mlp"}, {"kind": "ddpmpp"}])
def test_a_network_is_made_for_what_it_is_told(network: dict) -> None:
    told = resolve({"network": network, "augmentation": {"kind": "edm"}})
    untold = resolve({"network": network, "augmentation": {"kind": "mirror"}})
    assert (told["network"]["augment_dim"], untold["network"]["augment_dim"]) == (DIM, 0)
    # a network that could be told, as published ones are, may be trained without
    assert resolve({"network": network | {"augment_dim": DIM}})["network"]["augment_dim"] == DIM


def refused(raw: dict, match: str, allow: Sequence[type[nn.Module]] = ()) -> None:
    with pytest.raises(ConfigError, match=match):
        assemble(resolve(raw, allow=allow))


class Deaf(nn.Module):
    """A network that is told nothing but the noise."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_go_together_is_said() -> None:
    before = resolve({}).sections
    refused(override(before, ["augmentation.kind=edm"]), "augment_dim: .*'edm' is told in 9 numbers.*made for 0")
    refused({"augmentation": {"kind": "edm"}, "network": {"kind": f"{__name__}:Deaf"}}, "cannot be asked", allow=[Deaf])
    refused({"augmentation": {"kind": "edm", "p": 1.5}}, "p is a probability, not 1.5")
    refused({"augmentation": {"kind": "edm", "kinds": ["xflip", "shear"]}}, "augmentation.kinds.1: .*'shear'")
    refused({"augmentation": {"kind": "flip"}}, "'flip' is none of none, mirror, edm")
    refused({"training": {"label_dropout": 0.1}}, "needs labels to drop")
    refused({"training": {"label_dropout": 1.1, "conditional": True}}, "is a share, not 1.1")
    refused({"target": {"kind": "rolling", "size": 2000}}, "between 1 and the pool's 1797 members, not 2000")
    for augmentation in (EDMAugmentation(), Mirror()):
        with pytest.raises(ValueError, match=r"only images \(C, H, W\)"):
            augmentation.of_pool(Pool(torch.zeros(4, 3)))
    pool = labelled()
    assert Plain().of_pool(pool) is pool


def test_no_seed_but_the_run_s_decides_and_each_of_its_purposes_differs() -> None:
    def label(of: Callable[[int], Tensor]) -> bool:
        return torch.equal(of(0), of(0)) and not torch.equal(of(0), of(1))

    order = Shuffled(labelled(), 64)
    assert label(lambda seed: Augmented(order, EDMAugmentation(), seed)(0).augmentation)
    assert label(lambda seed: LabelDropout(order, 0.5, seed)(0).label)
