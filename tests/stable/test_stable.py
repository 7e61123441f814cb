"""`StableTarget`: bits, limits, precision, references, and what surrounds a training step."""

import copy
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from noisy_data import mean_by_differences, seeded
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from stablefield import (
    VE,
    VP,
    Cosine,
    DSMTarget,
    ExactTarget,
    Flow,
    Pool,
    StableTarget,
    STFTarget,
    SubVP,
)
from stablefield.prediction import PREDICTION_TYPES, stable_target
from stablefield.process import NoisyBatch, Process, per_example
from stablefield.stable import Bank, WithIndex
from stablefield.stable.references import hash_of

PROCESSES = [VE(), VP(), SubVP(), Cosine(), Flow()]
FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def data_points(n: int = 200, shape: tuple[int, ...] = (2, 3, 3)) -> Tensor:
    return torch.randn(n, *shape, generator=seeded(1)).clamp(-2, 2)


def batch_of(
    data: Tensor, size: int = 16, process: Process | None = None, dtype: torch.dtype = torch.float32, seed: int = 0
) -> NoisyBatch:
    g = seeded(seed)
    index = torch.randperm(len(data), generator=g)[:size]
    t = torch.rand(size, generator=g) * 0.8 + 0.1
    x = data[index].to(dtype)
    return (process or VE()).perturb(x, t.to(dtype), torch.randn(x.shape, generator=g).to(dtype), index=index)


def loop_target(noisy: NoisyBatch, process: Process, prediction_type: str) -> Tensor:
    """Target of a loop without stable targets, in the type of x."""
    return stable_target(noisy, noisy.x, process, prediction_type=prediction_type).to(noisy.x.dtype)


def arguments(noisy: NoisyBatch, process: Process) -> dict[str, Tensor]:
    d_alpha, d_sigma = process.rates(noisy.t)
    return {"alpha": noisy.alpha, "sigma": noisy.sigma, "d_alpha": d_alpha, "d_sigma": d_sigma}


def of_one(kind: str, noisy: NoisyBatch) -> tuple[StableTarget, dict[str, Any]]:
    """A stable target whose support is the source alone."""
    match kind:
        case "minibatch":
            return StableTarget(), {}
        case "estimator":
            return StableTarget(DSMTarget()), {}
        case "class":  # every example has a class of its own
            return StableTarget(), {"label": torch.arange(len(noisy))}
        case "bank":
            return StableTarget(Bank(len(noisy))), {"index": noisy.index, "label": torch.arange(len(noisy))}
        case _:
            return StableTarget(data_points(), size=1), {"index": noisy.index}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("kind", ["minibatch", "estimator", "class", "bank", "tensor"])
def test_a_support_of_one_returns_the_bits_of_the_loop(kind: str, prediction_type: str, dtype: torch.dtype) -> None:
    for process in PROCESSES:
        noisy = batch_of(data_points(), 1 if kind == "minibatch" else 8, process, dtype)
        target = loop_target(noisy, process, prediction_type)
        stable, more = of_one(kind, noisy)
        stable = StableTarget(stable.references, prediction_type)
        found = stable(target, noisy.x_t, noisy.x, **arguments(noisy, process), **more)
        assert found.dtype == dtype
        assert torch.equal(found.view(torch.uint8), target.view(torch.uint8))
        assert stable.ess is not None
        assert torch.equal(stable.ess, torch.ones(len(noisy)))


def test_negative_zeros_and_sigma_zero_keep_their_bits() -> None:
    target = torch.tensor([[-0.0, 0.0], [1.0, -0.0]])
    x = torch.tensor([[1.0, 2.0], [1.0, 2.0]])  # two copies of one point: their mean is x
    for prediction_type in ("x0", "epsilon", "score", "velocity", "v"):
        stable = StableTarget(prediction_type=prediction_type, checks=0)
        for sigma in (0.0, 1e-30, 0.5):
            found = stable(target, x, x, alpha=1.0, sigma=sigma, d_alpha=0.0, d_sigma=1.0)
            assert torch.equal(found.view(torch.int32), target.view(torch.int32))


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)
@pytest.mark.parametrize("prediction_type", [*PREDICTION_TYPES, "sample", "v_prediction", "flow_prediction"])
def test_the_stable_target_is_the_mean_converted_to_the_prediction_type(prediction_type: str, process: Process) -> None:
    noisy = batch_of(data_points().double(), 12, process, torch.float64)
    mean = mean_by_differences(noisy, noisy.x)
    wanted = stable_target(noisy, mean, process, prediction_type=prediction_type)
    target = loop_target(noisy, process, prediction_type)
    stable = StableTarget(None, prediction_type)
    found = stable(target, noisy.x_t, noisy.x, **arguments(noisy, process))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    if process == Flow():
        assert torch.equal(stable(target, noisy.x_t, noisy.x, alpha=noisy.alpha, sigma=noisy.sigma), found)


@pytest.mark.parametrize("kind", ["tensor", "mapped", "pool", "drawn", "bytes", "estimator", "bank", "minibatch"])
def test_all_data_as_references_give_the_exact_target(kind: str, tmp_path: Path) -> None:
    data = data_points(64)
    noisy = batch_of(data, 64 if kind == "minibatch" else 16)
    label = (noisy.index % 3) if kind != "estimator" else None
    labels = torch.arange(64) % 3
    options: dict[str, Any] = {"size": 64}
    references: Any = None
    match kind:
        case "tensor":
            references, options = data, {"labels": labels, "size": None}
        case "mapped":
            np.save(tmp_path / "data.npy", data.numpy())
            references, options = np.load(tmp_path / "data.npy", mmap_mode="r"), {"labels": labels}
        case "pool":
            references, options = Pool(data, labels), {"size": None}
        case "drawn":
            references = Pool(data, labels)
        case "bytes":
            stored = (data * 32 + 128).round().to(torch.uint8)
            data = (stored.float() - 128) / 32
            noisy = batch_of(data)
            references, options = stored, {"labels": labels, "transform": lambda x: (x.float() - 128) / 32}
        case "estimator":
            references = STFTarget(Pool(data), 64)
        case "bank":
            references = Bank(80)
            before = StableTarget(references)
            for index in torch.arange(64).split(16):
                everyone = VE().perturb(data[index], torch.ones(16), torch.randn(16, 2, 3, 3, generator=seeded(0)))
                before(everyone.noise, everyone.x_t, everyone.x, alpha=1.0, sigma=1.0, index=index, label=index % 3)
    stable = StableTarget(references, "x0", **options)
    found = stable(noisy.x, noisy.x_t, noisy.x, alpha=1.0, sigma=noisy.sigma, index=noisy.index, label=label)
    labelled = NoisyBatch(noisy.x, noisy.noise, noisy.t, noisy.alpha, noisy.sigma, noisy.x_t, label)
    torch.testing.assert_close(found, mean_by_differences(labelled, data, labels).float(), rtol=0, atol=1e-5)


def test_an_example_with_the_null_label_uses_the_data_points_of_all_classes() -> None:
    data = data_points(60)
    noisy = batch_of(data, 12)
    label = torch.where(torch.arange(12) < 4, -1, noisy.index % 3)
    for options in ({"size": None}, {"size": 60}):
        stable = StableTarget(data, "x0", labels=torch.arange(60) % 3, **options)  # type: ignore[arg-type]
        found = stable(noisy.x, noisy.x_t, noisy.x, alpha=1.0, sigma=noisy.sigma, index=noisy.index, label=label)
        wanted = NoisyBatch(noisy.x, noisy.noise, noisy.t, noisy.alpha, noisy.sigma, noisy.x_t, label)
        exact = mean_by_differences(wanted, data, torch.arange(60) % 3).float()
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-5)


def test_near_duplicates_at_small_sigma_keep_the_digits_of_the_noise() -> None:
    sigma, g = 0.002, seeded(0)
    x = torch.randn(4, 3072, generator=g)
    close = x + 0.0005 / 3072**0.5 * torch.randn(4, 3072, generator=g)
    data = torch.cat([x, close])
    noise = torch.randn(8, 3072, generator=g)
    x_t = data + sigma * noise
    found = StableTarget()(noise, x_t, data, alpha=1.0, sigma=sigma)
    level = torch.full((8,), sigma, dtype=torch.float64)
    exact = mean_by_differences(
        NoisyBatch(data.double(), noise.double(), level, torch.ones_like(level), level, x_t.double()), data.double()
    )
    wanted = noise.double() - (exact - data.double()) / sigma
    assert (found - wanted).norm() <= 1e-6 * noise.norm()
    assert (found - noise).norm() > 1e-3 * noise.norm()  # it is averaged


# ---- references


def push(bank: Bank, index: list[int], version: float, label: Tensor | None = None) -> Tensor:
    """One call with examples whose values are their index plus a version."""
    where = torch.tensor(index)
    x = (where[:, None].double() + version).repeat(1, 2)
    StableTarget(bank, "x0", checks=0)(x, x, x, alpha=1.0, sigma=1.0, index=where, label=label)
    held = torch.cat([bank.index[:, None].double(), bank.data], 1) if bank.data is not None else torch.empty(0)
    return held[bank.index >= 0].sort(0).values


def test_a_bank_holds_the_newest_version_of_the_examples_seen_last() -> None:
    bank = Bank(4)
    assert push(bank, [0, 1], 0.1)[:, :2].tolist() == [[0, 0.1], [1, 1.1]]
    assert push(bank, [2, 1], 0.2)[:, :2].tolist() == [[0, 0.1], [1, 1.2], [2, 2.2]]
    assert push(bank, [3, 4, 3], 0.3)[:, 0].tolist() == [1, 2, 3, 4]  # 0 was not seen for longest
    assert push(bank, [5, 0], 0.4)[:, 0].tolist() == [0, 3, 4, 5]
    assert push(bank, [7, 8, 9, 6], 0.5)[:, 0].tolist() == [6, 7, 8, 9]


def test_a_bank_resumes_from_its_state() -> None:
    data, stables = data_points(), [StableTarget(Bank(40)), StableTarget(Bank(40))]

    def call(stable: StableTarget, step: int) -> Tensor:
        noisy = batch_of(data, seed=step)
        return stable(noisy.noise, noisy.x_t, noisy.x, alpha=1.0, sigma=noisy.sigma, index=noisy.index)

    for step in range(3):
        call(stables[0], step)
    stables[1].load_state_dict(copy.deepcopy(stables[0].state_dict()))
    for step in range(3, 6):
        assert torch.equal(call(stables[0], step), call(stables[1], step))
    with pytest.raises(ValueError, match=r"Bank\(40\), not of Bank\(41\)"):
        StableTarget(Bank(41)).load_state_dict(stables[0].state_dict())
    with pytest.raises(ValueError, match="not that of a StableTarget with Minibatch"):
        StableTarget().load_state_dict(stables[0].state_dict())


def test_draws_repeat_with_the_seed_and_resume_from_the_state() -> None:
    data = data_points()
    noisy = batch_of(data)

    def call(stable: StableTarget, generator: torch.Generator | None = None) -> Tensor:
        sigma = 2 * torch.ones(16)
        x_t = noisy.x + 2 * noisy.noise
        return stable(noisy.noise, x_t, noisy.x, alpha=1.0, sigma=sigma, index=noisy.index, generator=generator)

    first, again, other = (StableTarget(data, size=20, seed=seed) for seed in (3, 3, 4))
    found = call(first)
    assert torch.equal(found, call(again))
    assert not torch.equal(found, call(other))
    assert not torch.equal(found, call(first))
    again.load_state_dict(first.state_dict())
    assert torch.equal(call(first), call(again))
    assert torch.equal(call(first, seeded(7)), call(other, seeded(7)))


def test_no_random_number_of_the_loop_is_used() -> None:
    data, before = data_points(), torch.random.get_rng_state()
    noisy = batch_of(data)
    for references in (None, Bank(30), data):
        stable = StableTarget(references)
        stable(noisy.noise, noisy.x_t, noisy.x, alpha=1.0, sigma=noisy.sigma, index=noisy.index)
    assert torch.equal(before, torch.random.get_rng_state())


def test_equal_values_stand_for_an_index_where_no_value_occurs_twice() -> None:
    data = data_points()
    for references in (None, "bank", data):
        found = []
        for match in ("index", "values"):
            stable = StableTarget(Bank(50) if isinstance(references, str) else references, size=60, match=match)
            for step in range(2):
                noisy = batch_of(data, seed=step)
                index = noisy.index if match == "index" else None
                with pytest.warns(UserWarning, match="biased") if match == "values" and step == 0 else nullcontext():
                    out = stable(noisy.noise, noisy.x_t, noisy.x, alpha=1.0, sigma=noisy.sigma, index=index)
            found.append(out)
        # a draw of n - 1 others and the source, or of n and the source: equal only where both are all data
        assert references is data or torch.equal(*found)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_hashes_are_equal_for_equal_values_only(dtype: torch.dtype) -> None:
    x = torch.randn(2000, 5, generator=seeded(0)).to(dtype)
    x[1000:] = x[:1000]
    x[500, 3], x[1500, 3] = 0.0, -0.0
    hashes = hash_of(x)
    assert torch.equal(hashes[:1000], hashes[1000:])
    assert len(hashes.unique()) == len(x.unique(dim=0))
    assert len(hash_of(x.flip(1)).unique()) == len(hashes.unique())
    assert not torch.isin(hash_of(x.flip(1)[:900]), hashes).any()


def test_a_data_set_with_index_brings_it_through_a_data_loader() -> None:
    x, label = torch.randn(10, 2), torch.arange(10) % 3
    loader = DataLoader(WithIndex(TensorDataset(x, label)), batch_size=4, shuffle=True)
    for (points, classes), index in loader:
        assert torch.equal(points, x[index])
        assert torch.equal(classes, label[index])
    entries = [{"image": row} for row in x]
    for batch in DataLoader(WithIndex(entries, "where"), batch_size=5):
        assert torch.equal(batch["image"], x[batch["where"]])


# ---- around a training step


class Waits(TorchDispatchMode):
    """Counts the operations that would wait for a GPU, if the data were there."""

    NAMES = ("_local_scalar_dense", "nonzero", "_unique2", "unique_consecutive", "masked_select", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[-1]
        by_mask = name.startswith("index") and isinstance(args[1], list | tuple)
        by_mask = by_mask and any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1])
        if name in self.NAMES or by_mask:
            self.found[name] += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("kind", ["minibatch", "labels", "gathered", "bank", "tensor", "values"])
def test_a_call_waits_for_the_gpu_once_after_the_checks(kind: str) -> None:
    data = data_points()
    references = {"bank": Bank(40), "tensor": data}.get(kind)
    options: dict[str, Any] = {"gather": lambda x: torch.cat([x, x])} if kind == "gathered" else {}
    stable = StableTarget(references, size=128, match="values" if kind == "values" else "index", **options)
    for step in range(6):
        noisy = batch_of(data, seed=step)
        label = noisy.index % 3 if kind in ("labels", "bank") else None
        index = None if kind == "values" else noisy.index
        with Waits() as waits:
            stable(noisy.noise, noisy.x_t, noisy.x, alpha=1.0, sigma=noisy.sigma, index=index, label=label)
        if step >= 4:
            assert waits.found == {"_local_scalar_dense": 1}


def test_no_gradient_flows_and_gradients_accumulate() -> None:
    data, model = data_points(), torch.nn.Conv2d(2, 2, 3, padding=1)
    stable, plain = StableTarget(), torch.nn.Conv2d(2, 2, 3, padding=1)
    plain.load_state_dict(model.state_dict())
    for step in range(2):
        noisy = batch_of(data, seed=step)
        x_t = noisy.x_t.clone().requires_grad_()
        target = stable(noisy.noise + 0 * x_t, x_t, noisy.x, alpha=1.0, sigma=noisy.sigma)
        assert not target.requires_grad
        for each in (model, plain):
            (each(noisy.x_t) - target).square().mean().backward()
    assert model.weight.grad is not None
    assert plain.weight.grad is not None
    assert torch.equal(model.weight.grad, plain.weight.grad)


@pytest.fixture
def tf32() -> Iterator[None]:
    """A loop that allows TF32 and half-precision products."""
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


def few_of(data: Tensor, noisy: NoisyBatch) -> Tensor:
    stable = StableTarget(data, size=64)
    return stable(noisy.noise, noisy.x_t, noisy.x, alpha=1.0, sigma=noisy.sigma, index=noisy.index)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_autocast_changes_no_bit(dtype: torch.dtype) -> None:
    data = data_points().to(dtype)
    noisy = batch_of(data, dtype=dtype)
    plain = few_of(data, noisy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(few_of(data, noisy), plain)


@pytest.mark.usefixtures("tf32")
def test_allowing_tf32_changes_no_bit() -> None:
    noisy = batch_of(data_points())
    found = few_of(data_points(), noisy)
    torch.set_float32_matmul_precision("highest")
    assert torch.equal(few_of(data_points(), noisy), found)


COMPILED = """
import torch
from stablefield import StableTarget
from stablefield.stable import Bank

def step(stable, x, noise, sigma, index):
    x_t = x + sigma * noise
    target = stable(noise, x_t, x, alpha=1.0, sigma=sigma, index=index)
    return (torch.tanh(x_t) - target).square().mean()

compiled = torch.compile(step, backend="eager")
a, b = StableTarget(Bank(40)), StableTarget(Bank(40))
for seed in range(6):
    torch.manual_seed(seed)
    inputs = torch.randn(16, 5), torch.randn(16, 5), torch.rand(16, 1) + 0.1, torch.randperm(100)[:16]
    assert torch.equal(compiled(a, *inputs), step(b, *inputs))
assert a.references.step == 6 and torch.equal(a.ess, b.ess)
print("equal")
"""


def test_a_compiled_step_calls_it() -> None:
    # in a process of its own: the checks of annotations in tests cannot be compiled
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.stdout == "equal\n", done.stderr


@pytest.mark.usefixtures("unchecked")
def test_numbers_and_shapes_of_alpha_and_sigma_are_equivalent() -> None:
    data = data_points()
    noisy = VP().perturb(data[:8], torch.full((8,), 0.4), torch.randn(8, 2, 3, 3, generator=seeded(0)))
    alpha, sigma = float(noisy.alpha[0]), float(noisy.sigma[0])
    found = [
        StableTarget()(noisy.noise, noisy.x_t, noisy.x, alpha=a, sigma=s)
        for a, s in (
            (alpha, sigma),
            (np.float32(alpha), np.float64(sigma)),
            (noisy.alpha, noisy.sigma),
            (noisy.alpha[0], per_example(noisy.sigma, noisy.x)),
            (noisy.alpha[:1].view(1, 1, 1, 1), noisy.sigma[:, None]),
        )
    ]
    assert all(torch.equal(each, found[0]) for each in found)


def test_an_exact_estimator_and_all_data_agree() -> None:
    data = data_points(100)
    noisy = batch_of(data)
    found = [
        StableTarget(references, size=None)(
            noisy.noise, noisy.x_t, noisy.x, alpha=1.0, sigma=noisy.sigma, index=noisy.index
        )
        for references in (data, Pool(data), ExactTarget(Pool(data)))
    ]
    assert torch.equal(found[1], found[2])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)


PAGE = (Path(__file__).parents[2] / "docs" / "loop.md").read_text()


@pytest.mark.usefixtures("unchecked")
def test_the_code_of_the_page_runs_from_top_to_bottom() -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(block, "loop.md", "exec"), names)
    assert names["stable"].calls == 2
