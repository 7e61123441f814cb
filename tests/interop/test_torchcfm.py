"""torchcfm: closed forms of its paths, with and without bridge noise, and the scripts of the page."""

import pytest
import torch

pytest.importorskip("torchcfm")
from pages import blocks, check, run
from torchcfm.conditional_flow_matching import (
    ConditionalFlowMatcher,
    ExactOptimalTransportConditionalFlowMatcher,
    SchrodingerBridgeConditionalFlowMatcher,
    TargetConditionalFlowMatcher,
    VariancePreservingConditionalFlowMatcher,
)

from stablefield.interop.torchcfm import StableFlow
from stablefield.stable import Bank

DATA = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
STRAIGHT, TARGET, PRESERVING = (
    ConditionalFlowMatcher,
    TargetConditionalFlowMatcher,
    VariancePreservingConditionalFlowMatcher,
)


def path(matcher: object, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(a, b, a', b', s) in float64, written independently of the adapter."""
    t, s = t.double()[:, None], float(matcher.sigma)
    match matcher:
        case TargetConditionalFlowMatcher():
            return t, 1 - t + s * t, torch.ones_like(t), torch.full_like(t, s - 1), torch.zeros_like(t)
        case VariancePreservingConditionalFlowMatcher():
            angle = t * torch.pi / 2
            return (
                angle.sin(),
                angle.cos(),
                angle.cos() * torch.pi / 2,
                -angle.sin() * torch.pi / 2,
                torch.full_like(t, s),
            )
        case _:
            return t, 1 - t, torch.ones_like(t), -torch.ones_like(t), torch.full_like(t, s)


def exact_mean(matcher: object, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """E[u_t | x_t] over all data, by conditioning the joint Gaussian of (x_0, s e) on each data point."""
    a, b, d_a, d_b, s = path(matcher, t)
    rest = x_t.double()[:, None] - a[:, None] * DATA.double()
    variance = (b**2 + s**2)[:, None]
    weights = (-rest.square().sum(-1, keepdim=True) / (2 * variance)).softmax(1)
    velocity = d_a[:, None] * DATA.double() + d_b[:, None] * (b[:, None] / variance) * rest
    return (weights * velocity).sum(1)


def batch(matcher: object, size: int = 256, t: float | None = None, seed: int = 0) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(seed)
    index = torch.randint(len(DATA), (size,))
    times = torch.rand(size) if t is None else torch.full((size,), t)
    _, x_t, u_t = matcher.sample_location_and_conditional_flow(torch.randn(size, 3), DATA[index], times)
    return u_t, x_t, DATA[index], times, index


MATCHERS = [STRAIGHT(0.0), STRAIGHT(0.1), STRAIGHT(0.5), TARGET(0.0), TARGET(0.2), PRESERVING(0.0), PRESERVING(0.3)]


@pytest.mark.parametrize("matcher", MATCHERS, ids=lambda m: f"{type(m).__name__} {m.sigma}")
def test_all_data_give_the_exact_velocity_up_to_the_noise_of_the_path(matcher: object) -> None:
    u_t, x_t, x_1, t, index = batch(matcher)
    wanted = exact_mean(matcher, x_t, t)
    size = 1e-4 * (1 + wanted.abs() + u_t.abs())  # the loop's float32, divided by what may be small near t = 1
    flow = StableFlow(matcher, DATA, size=None, average_noise=True)
    averaged = flow(u_t, x_t, x_1, t, index=index)
    has_noise = flow.noise > 0
    inside = (t < 0.98)[:, None] if not has_noise else torch.ones(len(t), 1, dtype=torch.bool)
    assert ((averaged - wanted).abs() <= size)[inside.expand_as(size)].all()
    found = StableFlow(matcher, DATA, size=None)(u_t, x_t, x_1, t, index=index)
    if not has_noise:
        assert torch.equal(found, averaged)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("matcher", [STRAIGHT(0.3), PRESERVING(0.3)], ids=lambda m: type(m).__name__)
def test_what_remains_has_the_variance_that_the_noise_of_the_path_leaves(matcher: object, t: float) -> None:
    u_t, x_t, x_1, times, index = batch(matcher, 20_000, t)
    stable = StableFlow(matcher, DATA, size=None)(u_t, x_t, x_1, times, index=index)
    rest = stable.double() - exact_mean(matcher, x_t, times)
    _, b, _, d_b, s = (value[0] for value in path(matcher, times[:1]))
    wanted = float(s**2 * d_b**2 / (b**2 + s**2))
    assert abs(float(rest.mean())) < 5 * (wanted / rest.numel()) ** 0.5 + 1e-6
    assert abs(float(rest.square().mean()) / wanted - 1) < 6 * (2 / rest.numel()) ** 0.5 + 1e-3


@pytest.mark.parametrize("average_noise", [False, True])
@pytest.mark.parametrize("size", [1, 4, 24])
def test_targets_are_unbiased_for_every_number_of_references(size: int, average_noise: bool) -> None:
    matcher = STRAIGHT(0.3)
    u_t, x_t, x_1, t, index = batch(matcher, 20_000, 0.6)
    flow = StableFlow(matcher, DATA, size=size, average_noise=average_noise)
    drawn = [
        flow(*(value[k : k + 100] for value in (u_t, x_t, x_1, t)), index=index[k : k + 100])
        for k in range(0, 20_000, 100)
    ]
    rest = torch.cat(drawn).double() - exact_mean(matcher, x_t, t)
    # against functions of x_t: its sign in each dimension, and a constant
    for probe in (torch.ones_like(rest), x_t.double().sign(), x_t.double().abs() - x_t.double().abs().mean()):
        product = rest * probe
        assert float(product.mean().abs()) < 5 * float(product.std()) / product[:, 0].numel() ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("matcher", MATCHERS, ids=lambda m: f"{type(m).__name__} {m.sigma}")
def test_one_candidate_keeps_the_bits_of_the_loop(matcher: object, dtype: torch.dtype) -> None:
    u_t, x_t, x_1, t, index = batch(matcher)
    x_1, u_t, x_t = x_1.to(dtype), u_t.to(dtype), x_t.to(dtype)
    checks = 4 if dtype == torch.float32 else 0
    for references, options in ((DATA, {"size": 1}), (Bank(256), {})):
        flow = StableFlow(matcher, references, checks=checks, **options)
        label = torch.arange(256) if references is not DATA else None
        found = flow(u_t, x_t, x_1, t, index=index if label is None else label, label=label)
        assert found.dtype == dtype
        assert torch.equal(found, u_t)


@pytest.mark.parametrize("matcher", [STRAIGHT(0.0), STRAIGHT(0.3)], ids=lambda m: str(m.sigma))
def test_mistakes_are_refused(matcher: object) -> None:
    u_t, x_t, x_1, t, index = batch(matcher)
    for wrong in ((-u_t, x_t, x_1, t), (u_t, x_t, x_1, 1 - t), (u_t.flip(0), x_t, x_1, t), (u_t, x_t, x_1.flip(0), t)):
        with pytest.raises(ValueError, match=r"is not|is another"):
            StableFlow(matcher, DATA)(*wrong, index=index)


def test_matchers_that_couple_noise_and_data_are_refused() -> None:
    for matcher in (ExactOptimalTransportConditionalFlowMatcher(), SchrodingerBridgeConditionalFlowMatcher()):
        with pytest.raises(ValueError, match="couples noise and data"):
            StableFlow(matcher, DATA)

    class Curved(ConditionalFlowMatcher):
        pass

    with pytest.raises(ValueError, match="path of Curved is not known"):
        StableFlow(Curved(0.0), DATA)


@pytest.mark.usefixtures("unchecked")
def test_the_script_of_the_page_keeps_its_weights_with_one_candidate() -> None:
    check("torchcfm.md", 0)


@pytest.mark.usefixtures("unchecked")
def test_the_figures_of_the_page_are_right() -> None:
    names: dict = {}
    for language, code in blocks("torchcfm.md"):
        names = run(code, names) if language == "python" else names
    assert abs(float(names["remains"]) - 0.9) < 0.05
    assert abs(float(names["loops_own"]) - 1.2) < 0.1
    assert names["independent"] < 0.04
    assert [round(value, 2) for value in names["coupled"].values()] == pytest.approx([0.12, 0.34, 0.60], abs=0.03)
