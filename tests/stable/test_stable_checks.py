"""Checks of the first calls of `StableTarget`: mistakes are refused by name, right calls never."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from noisy_data import seeded
from torch import Tensor

from stablefield import VE, VP, Cosine, Flow, Pool, StableTarget, SubVP
from stablefield.process import per_example
from stablefield.stable import Bank
from stablefield.stable.checks import rounding

pytestmark = pytest.mark.usefixtures("unchecked")
DATA = torch.rand(500, 3, 4, 4, generator=seeded(5)) * 2 - 1
Call = dict[str, Any]


def right_call(kind: str = "vp", size: int = 16, dtype: torch.dtype = torch.float32, seed: int = 0) -> Call:
    """A call with the target of epsilon; "flow" has the velocity noise - x."""
    g = seeded(seed)
    index = torch.randperm(len(DATA), generator=g)[:size]
    x, noise = DATA[index].to(dtype), torch.randn(size, 3, 4, 4, generator=g).to(dtype)
    t = torch.rand(size, generator=g) * 0.8 + 0.1
    process = {"ve": VE(), "vp": VP(), "flow": Flow(), "cosine": Cosine()}[kind]
    alpha, sigma = process.scales(t)
    x_t = per_example(alpha, x) * x + per_example(sigma, x) * noise
    target = noise - x if kind == "flow" else noise
    return {"target": target, "x_t": x_t, "x": x, "alpha": alpha, "sigma": sigma, "index": index}


def run(call: Call, prediction_type: str = "epsilon", references: Any = None, **options: Any) -> Tensor:
    return StableTarget(references, prediction_type, **options)(**call)


# ---- the target


def v_of(call: Call) -> Tensor:
    alpha, sigma = (per_example(call[name], call["x"]) for name in ("alpha", "sigma"))
    return alpha * call["target"] - sigma * call["x"]


@pytest.mark.parametrize(
    ("kind", "given", "change", "message"),
    [
        ("vp", "v", lambda c: {}, r"It fits prediction_type='epsilon'\."),
        ("vp", "epsilon", lambda c: {"target": v_of(c)}, r"It fits prediction_type='v'\."),
        ("vp", "epsilon", lambda c: {"target": -c["target"]}, "prediction_type='epsilon' and the opposite sign"),
        ("vp", "epsilon", lambda c: {"target": c["x"]}, r"It fits prediction_type='x0'\."),
        ("vp", "x0", lambda c: {}, r"It fits prediction_type='epsilon'\."),
        ("ve", "epsilon", lambda c: {"target": -c["target"] / per_example(c["sigma"], c["x"])}, "fits .*'score'"),
        ("vp", "epsilon", lambda c: {"alpha": c["sigma"], "sigma": c["alpha"]}, "exchanged"),
        ("vp", "epsilon", lambda c: {"alpha": 1.0}, r"with alpha = sqrt\(1 - sigma\^2\)"),
        ("vp", "epsilon", lambda c: {"sigma": 1.0}, r"with sigma = sqrt\(1 - alpha\^2\)"),
        ("vp", "epsilon", lambda c: {"alpha": c["alpha"] ** 2}, "square root of alpha"),
        ("vp", "epsilon", lambda c: {"sigma": c["sigma"] ** 2}, "square root of sigma"),
        ("vp", "epsilon", lambda c: {"alpha": c["alpha"] ** 2, "sigma": c["sigma"] ** 2}, "root of alpha and sigma"),
        ("vp", "epsilon", lambda c: {"x": c["x"].roll(1, 0)}, "No other prediction type"),
        ("flow", "velocity", lambda c: {"target": -c["target"]}, r"d_alpha=1, d_sigma=-1 \(t = 1 is data\)"),
        ("flow", "velocity", lambda c: {"alpha": c["sigma"], "sigma": c["alpha"]}, "exchanged"),
        ("flow", "epsilon", lambda c: {}, r"It fits prediction_type='velocity'\."),
        (
            "ve",
            "epsilon",
            lambda c: {"x_t": c["x_t"] / per_example((1 + c["sigma"] ** 2).sqrt(), c["x"])},
            "scale_model",
        ),
    ],
)
def test_a_target_of_another_type_is_refused_with_what_fits(
    kind: str, given: str, change: Callable[[Call], Call], message: str
) -> None:
    call = right_call(kind)
    with pytest.raises(ValueError, match=message):
        run(call | change(call), given)


def test_the_right_targets_of_those_loops_pass() -> None:
    for kind in ("ve", "vp", "cosine"):
        call = right_call(kind)
        run(call)
        run(call | {"target": v_of(call)}, "v_prediction")
        run(call | {"target": call["x"]}, "sample")
    flow = right_call("flow")
    run(flow, "velocity")
    run(flow | {"target": -flow["target"], "d_alpha": 1.0, "d_sigma": -1.0}, "flow_prediction")


def test_a_mistake_is_found_at_small_sigma_too() -> None:
    call = right_call("ve")
    sigma, noise = torch.full((16,), 0.002), call["target"]
    x_t = call["x"] + 0.002 * noise
    run(call | {"sigma": sigma, "x_t": x_t})
    with pytest.raises(ValueError, match="opposite sign"):
        run(call | {"sigma": sigma, "x_t": x_t, "target": -noise})


def test_a_velocity_without_rates_needs_a_flow() -> None:
    call = right_call("vp")
    with pytest.raises(ValueError, match=r"velocity needs d_alpha= and d_sigma=.*alpha \+ sigma is not 1"):
        run(call, "velocity")
    with pytest.raises(ValueError, match="both d_alpha and d_sigma"):
        run(call | {"d_alpha": 1.0}, "velocity")


# ---- the noise


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"alpha": c["sigma"], "sigma": c["alpha"]}, "mean square.*It is 1 with alpha and sigma exchanged"),
        (lambda c: {"sigma": c["sigma"] ** 2}, "the square root of sigma"),
        (lambda c: {"sigma": 9 * c["sigma"], "alpha": 3 * c["alpha"]}, "Check that"),
        (lambda c: {"x": 0.5 + 0.5 * c["x"], "target": 0.5 + 0.5 * c["x"]}, "mean square"),
        (lambda c: {"x": c["x"].roll(1, 0), "target": c["x"].roll(1, 0)}, "mean square"),
        (lambda c: {"x_t": c["x"]}, "mean square"),
    ],
)
def test_noise_of_another_level_than_sigma_is_refused(change: Callable[[Call], Call], message: str) -> None:
    call = right_call("vp", size=64)
    call["target"] = call["x"]  # whose check finds nothing
    run(call, "x0")
    with pytest.raises(ValueError, match=message):
        run(call | change(call), "x0")


# ---- the references


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("kind", ["tensor", "pool", "bank"])
def test_references_with_another_scale_than_x_are_refused(kind: str, labelled: bool) -> None:
    call = right_call("vp", size=64)
    labels = torch.arange(500) % 2
    if labelled:
        call["label"] = labels[call["index"]]
    for references in (0.5 + 0.5 * DATA, 3 + DATA, 127.5 + 127.5 * DATA, 0.2 * DATA):
        options: Call = {}
        source: Any = references
        if kind == "bank":
            source = Bank(300)
            before = {"target": references[:250], "x_t": references[:250], "x": references[:250]}
            label = labels[:250] if labelled else None
            numbers = {"alpha": 1.0, "sigma": 1.0, "index": torch.arange(250), "label": label}
            StableTarget(source, "x0", checks=0)(**before, **numbers)
        elif kind == "pool":
            source = Pool(references, labels if labelled else None)
        elif labelled:
            options = {"labels": labels}
        with pytest.raises(ValueError, match=r"references are not scaled as x: their (mean|minimum|maximum)"):
            run(call, references=source, **options)


def test_an_index_that_does_not_count_the_references_is_refused() -> None:
    call, shuffled = right_call("vp"), torch.randperm(500, generator=seeded(1))
    with pytest.raises(ValueError, match=r"is equal to reference .* in the order of the references"):
        run(call, references=DATA[shuffled])
    with pytest.raises(ValueError, match=r"index .* is out of range: there are 100 references"):
        run(call, references=DATA[:100])
    labels = torch.arange(500) % 7
    with pytest.raises(ValueError, match=r"example 0 has label .*, but the reference of its index"):
        run(call | {"label": (labels[call["index"]] + 1) % 7}, references=DATA, labels=labels)
    run(call | {"label": labels[call["index"]]}, references=DATA, labels=labels)
    run(call, references=DATA.flip(-1))  # another version of every data point


def test_an_index_out_of_range_is_refused_after_the_checks_too() -> None:
    call, stable = right_call("vp"), StableTarget(DATA, size=20)
    for _ in range(4):
        stable(**call)
    with pytest.raises(ValueError, match=r"index .*500.* is out of range"):
        stable(**call | {"index": call["index"].clone().fill_(500)})


# ---- types, shapes and values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": torch.arange(16)}, "alpha is torch.int64.*timesteps"),
        ({"sigma": torch.arange(16) + 1}, "sigma is torch.int64.*timesteps"),
        ({"sigma": torch.ones(16, dtype=torch.bool)}, "sigma is torch.bool"),
        ({"sigma": torch.ones(16, dtype=torch.complex64)}, "sigma must be real"),
        ({"sigma": True}, "sigma must be a number or a tensor, not bool"),
        ({"sigma": None}, "sigma must be a number or a tensor, not NoneType"),
        ({"sigma": [1.0] * 16}, "sigma must be a number or a tensor, not list"),
        ({"alpha": np.ones(16)}, "alpha must be a number or a tensor, not ndarray"),
        ({"sigma": torch.ones(15)}, r"\(16,\) or \(16, 1, ..., 1\).*not \(15,\)"),
        ({"sigma": torch.ones(16, 3, 4, 4)}, r"one value per example, not \(16, 3, 4, 4\)"),
        ({"sigma": torch.ones(1, 16)}, r"not \(1, 16\)"),
        ({"sigma": 0.0}, "sigma is 0 for every example"),
        ({"sigma": -1.0}, "sigma must be finite and not negative; example 0 has -1"),
        ({"sigma": float("nan")}, "sigma must be finite and not negative; example 0 has nan"),
        ({"alpha": float("inf")}, "alpha must be finite; example 0 has inf"),
        ({"x": DATA[:15]}, r"target must have the shape of x, \(15, 3, 4, 4\), not \(16, 3, 4, 4\)"),
        ({"target": DATA[:16, :1]}, r"target must have the shape of x"),
        ({"x_t": DATA[:16].flatten(1)}, r"x_t must have the shape of x"),
        ({"x": DATA[:16].to(torch.uint8)}, "x must be floating, not torch.uint8"),
        ({"x": DATA[:16].numpy()}, "x must be a tensor, not ndarray"),
        ({"target": None}, "target must be a tensor, not None"),
        ({"x_t": DATA[:16].to_sparse()}, "x_t must be dense"),
        ({"x_t": DATA[:16].to("meta")}, "x_t is on meta, but x is on cpu"),
        ({"index": list(range(16))}, "index must be a tensor, not list"),
        ({"index": torch.arange(15)}, r"index must be integers of shape \(16,\)"),
        ({"index": torch.arange(16).float()}, r"index must be integers of shape \(16,\), not torch.float32"),
        ({"label": torch.zeros(16, 10)}, r"label must be integers.*one-hot labels pass label.argmax\(1\)"),
    ],
)
def test_wrong_arguments_are_refused_by_name(change: Call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(right_call("vp") | change)


@pytest.mark.parametrize("name", ["target", "x_t", "x"])
@pytest.mark.parametrize("checks", [0, 4])
def test_values_that_are_not_finite_are_refused_at_any_time(name: str, checks: int) -> None:
    call = right_call("vp")
    call[name] = call[name].clone()
    call[name][3, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=f"{name} must be finite; example 3 has nan"):
        run(call, checks=checks)


def test_references_that_are_not_finite_and_results_beyond_a_type_are_refused() -> None:
    data = DATA.clone()
    data[3] = float("nan")
    with pytest.raises(ValueError, match="references hold values that are not finite"):
        run(right_call("vp"), references=data, size=None, checks=0)
    x = torch.tensor([[0.0], [0.005]], dtype=torch.float16)
    largest = torch.full_like(x, 65504)
    with pytest.raises(ValueError, match=r"too large for torch.float16"):
        StableTarget(None, "score", checks=0)(largest, 0 * x, x, alpha=1.0, sigma=0.002)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: StableTarget("data"), "references must be None"),
        (lambda: StableTarget([DATA]), "references must be None"),
        (lambda: StableTarget(DATA.byte()), "references are torch.uint8.*Pool"),
        (lambda: StableTarget(DATA, size=0), "size must be at least 1"),
        (lambda: StableTarget(DATA, labels=torch.zeros(3)), r"labels must have the shape \(500,\)"),
        (lambda: StableTarget(None, labels=torch.zeros(3)), "labels and transform belong to references drawn"),
        (lambda: StableTarget(DATA, gather=lambda x: x), "gather belongs to a minibatch or Bank"),
        (lambda: StableTarget(None, "noise"), "unknown prediction type 'noise'"),
        (lambda: StableTarget(None, match="value"), 'match must be "index" or "values"'),
        (lambda: Bank(0), "at least 1 example"),
        (lambda: run(right_call() | {"index": None}, references=DATA), r"need index=.*WithIndex\(dataset\)"),
        (lambda: run(right_call() | {"index": None}, references=Bank(40)), r"need index=.*WithIndex\(dataset\)"),
        (lambda: run(right_call(), references=Bank(10)), "a bank of 10 examples cannot hold a batch of 16"),
        (lambda: run(right_call(), match="values"), "leave index out"),
        (
            lambda: run(right_call() | {"label": torch.arange(16)}, references=DATA),
            "references have no labels: pass lab",
        ),
        (lambda: run(right_call(), references=DATA, transform=lambda x: x[:1]), "transform must return"),
        (lambda: run(right_call(), references=DATA[:, :1]), r"references have shape \(1, 4, 4\), but examples"),
    ],
)
def test_references_and_options_that_do_not_fit_are_refused(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_a_refused_call_leaves_the_bank_as_it_was() -> None:
    bank = Bank(40)
    stable = StableTarget(bank)
    with pytest.raises(ValueError, match="opposite sign"):
        stable(**right_call() | {"target": -right_call()["target"]})
    assert bank.data is None
    assert stable.calls == 0


# ---- right calls are never refused


def random_call(g: torch.Generator) -> tuple[StableTarget, Call]:
    """A right call of random size, type, process and noise level, in the arithmetic of a loop."""

    def choose(*options: Any) -> Any:
        return options[int(torch.randint(len(options), (), generator=g))]

    size, dim, dtype = choose(1, 2, 5, 16, 64), choose(1, 2, 3, 16, 100), choose(*FLOATS)
    x = (torch.randn(size, dim, generator=g) * choose(0.1, 1, 3)).clamp(-4, 4).to(dtype)
    if choose(False, False, True):
        x = x.sign()  # binary data
    noise = torch.randn(size, dim, generator=g).to(dtype)
    kind = choose("ve", "vp", "subvp", "cosine", "flow")
    t = torch.rand(size, generator=g, dtype=torch.float64)
    t = t[:1].expand(size) if choose(False, True) else t
    if kind == "ve":
        t = 0.002 * 40000**t
        alpha, sigma, rates = torch.ones_like(t), t, (torch.zeros_like(t), torch.ones_like(t))
    else:
        process = {"vp": VP(), "subvp": SubVP(), "cosine": Cosine(), "flow": Flow()}[kind]
        t = t * 0.998 + 0.002
        (alpha, sigma), rates = process.scales(t), process.rates(t)
    working = choose(dtype, torch.float32) if dtype != torch.float64 else dtype  # in which the loop computes
    narrow = [value[:, None].to(working) for value in (alpha, sigma, *rates)]
    a, s, da, ds = narrow
    x_t = (a * x + s * noise).to(dtype if choose(False, True) else torch.promote_types(working, dtype))
    prediction_type = choose("x0", "epsilon", "score", "velocity", "v")
    target = {
        "x0": lambda: x,
        "epsilon": lambda: noise,
        "score": lambda: -noise / s,
        "velocity": lambda: da * x + ds * noise,
        "v": lambda: a * noise - s * x,
    }[prediction_type]()
    if choose(False, False, True):  # some loops cast the target, or their scales
        target = target.to(dtype)
    scales = narrow if choose(False, True) else [value.float() for value in (alpha, sigma, *rates)]
    names = ("alpha", "sigma", "d_alpha", "d_sigma")
    call = {"target": target, "x_t": x_t, "x": x} | dict(zip(names, scales, strict=True))
    references, more = None, {}
    if choose(False, False, True):  # other draws of the same distribution
        data = torch.cat([x, x[torch.randint(size, (200,), generator=g)].roll(1, 0)]) if size > 16 else None
        if data is not None:
            references, more = data, {"index": torch.arange(size)}
    return StableTarget(references, prediction_type, size=32), call | more


FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def never_refused(trials: range) -> None:
    for trial in trials:
        stable, call = random_call(seeded(trial))
        if torch.isfinite(call["target"]).all() and torch.isfinite(call["x_t"]).all():
            try:
                stable(**call)
            except ValueError as error:
                if "too large for" not in str(error):
                    raise AssertionError(f"trial {trial}, {stable}: {error}") from error


def test_no_right_call_is_refused_in_2000_trials() -> None:
    never_refused(range(2000))


@pytest.mark.slow
def test_no_right_call_is_refused_in_100000_trials() -> None:
    never_refused(range(2000, 102_000))


def test_in_bfloat16_the_limits_of_the_noise_follow_the_rounding() -> None:
    # at sigma = 0.002 the mean square of (x_t - x) / sigma is far above 1 when all is right
    x = DATA[:64].bfloat16()
    noise = torch.randn(x.shape, generator=seeded(0)).bfloat16()
    x_t = x + 0.002 * noise
    assert ((x_t.double() - x.double()) / 0.002).square().mean() > 1.1
    run({"target": x, "x_t": x_t, "x": x, "alpha": 1.0, "sigma": 0.002}, "x0")


def test_the_rounding_is_that_of_the_coarsest_type_that_took_part() -> None:
    x = torch.randn(100, generator=seeded(0))
    assert rounding([x], [1.0])[0] == 2.0**-24
    assert rounding([x.bfloat16()], [1.0])[0] == torch.finfo(torch.bfloat16).eps / 2
    assert rounding([x.half().float(), x], [1.0])[0] == 2.0**-11
    assert rounding([x.double()], [x[:1].half()])[0] == 2.0**-11


@pytest.mark.parametrize("scaled", [True, False])
def test_one_example_of_each_of_several_classes_shows_references_of_another_scale(scaled: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    data, labels = torch.rand(2000, 3, 4, 4, generator=generator), torch.arange(2000) % 10
    index = torch.arange(8)
    x, noise = 2 * data[index] - 1, torch.randn(8, 3, 4, 4, generator=generator)
    stable = StableTarget(2 * data - 1 if scaled else data, labels=labels, size=16)
    call = {"alpha": 1.0, "sigma": 1.0, "index": index, "label": labels[index]}
    if scaled:
        assert torch.isfinite(stable(noise, x + noise, x, **call)).all()
    else:
        with pytest.raises(ValueError, match=r"references are not scaled as x: their (mean|minimum)"):
            stable(noise, x + noise, x, **call)
