"""Group normalisation on GPUs: equal to PyTorch's, in the layout and type of its input."""

from typing import Any

import pytest
import torch
from pretend_gpu import CUDA, PretendGPU
from torch import Tensor
from torch.nn.functional import group_norm
from torch.utils._python_dispatch import TorchDispatchMode

from stablefield.networks import UNet, adm, ddpmpp, ncsnpp
from stablefield.networks.group_norm import GroupNorm, GroupNormByChannel

LAST = torch.channels_last
SHAPES = [(2, 8, 6, 4), (3, 8, 5), (2, 8, 2, 3, 4), (2, 4, 1, 1)]


def features(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, mean: float = 0.5) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    x = mean + torch.randn(shape, generator=g, dtype=torch.float64)
    weight, bias = torch.randn(2, shape[1], generator=g, dtype=torch.float64)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [x.to(dtype).requires_grad_(), weight.to(wide).requires_grad_(), bias.to(wide).requires_grad_()]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_values_and_gradients_equal_pytorch_s(shape: tuple[int, ...], groups: int) -> None:
    x, weight, bias = features(shape)
    ours, expected = GroupNormByChannel.apply(x, groups, weight, bias, 1e-5), group_norm(x, groups, weight, bias)
    torch.testing.assert_close(ours, expected)
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    gradients = (torch.autograd.grad(y, (x, weight, bias), dy) for y in (ours, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_can_be_differentiated() -> None:
    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return GroupNormByChannel.apply(x, 2, weight, bias, 1e-5)

    assert torch.autograd.gradgradcheck(norm, features((2, 4, 3, 2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_statistics_are_float32_in_every_type(dtype: torch.dtype, mean: float) -> None:
    x, weight, bias = features((2, 16, 8, 8), dtype, mean)
    y = GroupNormByChannel.apply(x, 4, weight, bias, 1e-6)
    exact = group_norm(x.double(), 4, weight.double(), bias.double(), 1e-6)  # of x as it is rounded
    # one rounding of the result, and float32's rounding of a mean of 30 standard deviations
    assert (y.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max() + 1e-4
    assert y.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_half_precision_agree_to_its_rounding(dtype: torch.dtype) -> None:
    given = features((2, 16, 8, 8), dtype)
    dy = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours = torch.autograd.grad(GroupNormByChannel.apply(given[0], 4, *given[1:], 1e-6), given, dy)
    wide = [each.detach().double().requires_grad_() for each in given]
    exact = torch.autograd.grad(group_norm(wide[0], 4, *wide[1:], 1e-6), wide, dy.double())
    for one, other in zip(ours, exact, strict=True):
        assert (one.double() - other).norm() <= 2 * torch.finfo(dtype).eps * other.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_keep_layout_and_type_on_a_gpu(dtype: torch.dtype) -> None:
    norm = GroupNorm(4, 16)
    with PretendGPU() as gpu:
        norm.to(CUDA)
        x = torch.randn(2, 16, 8, 8, device=CUDA).to(dtype).to(memory_format=LAST).requires_grad_()
        gpu.clear()
        with torch.autocast("cuda", torch.bfloat16):
            y = norm(x)
        y.sum().backward()
    assert not gpu.mistakes
    assert not gpu.waits
    for found in (y, x.grad):
        assert found is not None
        assert found.is_contiguous(memory_format=LAST)
        assert found.dtype == dtype


def test_a_cpu_gets_pytorch_s_bits() -> None:
    x, weight, bias = features((2, 16, 8, 8), torch.float32)
    norm = GroupNorm(4, 16)
    norm.load_state_dict({"weight": weight, "bias": bias})
    assert torch.equal(norm(x), group_norm(x, 4, weight, bias))


def test_transforms_of_torch_func_work_on_a_gpu() -> None:
    norm = GroupNorm(4, 16)
    x = torch.randn(2, 16, 4, 4)
    expected = torch.func.vmap(torch.func.grad(lambda each: norm(each[None]).square().sum()))(x)
    with PretendGPU():
        norm.to(CUDA)
        found = torch.func.vmap(torch.func.grad(lambda each: norm(each[None]).square().sum()))(x.to(CUDA))
    torch.testing.assert_close(found.detach().cpu(), expected)


# ---- networks


class Convolutions(TorchDispatchMode):
    """Layout of input and weight, depthwise or not, and type, of every convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[bool, bool, bool, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name == "aten::convolution":
            x, weight = args[:2]
            last = (each.is_contiguous(memory_format=LAST) for each in (x, weight))
            self.seen.append((*last, weight.shape[1] == 1, x.dtype))
        return func(*args, **(kwargs or {}))


WIDE = {"model_channels": 32, "num_blocks": 1}
NETWORKS = {
    "ncsnpp": lambda: ncsnpp((3, 32, 32), **WIDE),
    "ddpmpp": lambda: ddpmpp((3, 32, 32), **WIDE),
    "adm": lambda: adm((3, 32, 32), **WIDE, channels_per_head=16),
    "unet": lambda: UNet((3, 32, 32)),
}


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("half", [False, True])
def test_on_a_gpu_convolutions_see_channels_last_in_the_autocast_type(build: Any, half: bool) -> None:
    network = build()
    with PretendGPU() as gpu:
        network.to(CUDA, memory_format=LAST)
        x, c_noise = torch.randn(2, 3, 32, 32, device=CUDA), torch.randn(2, device=CUDA)
        gpu.clear()
        with Convolutions() as convolutions, torch.autocast("cuda", torch.bfloat16, enabled=half):
            network(x, c_noise).float().sum().backward()
        assert not gpu.mistakes
        assert not gpu.waits
    # at most the image itself is channels first: for the first convolution, and the auxiliary path of NCSN++
    assert sum(not last for last, *_ in convolutions.seen) <= 3
    assert all(last or depthwise for _, last, depthwise, _ in convolutions.seen)
    assert {dtype for *_, dtype in convolutions.seen} == {torch.bfloat16 if half else torch.float32}
