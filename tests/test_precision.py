"""Arithmetic: TF32 is off unless asked for, settings are restored, and half precision stays in the products."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor

from stablefield.precision import PRECISIONS, arithmetic, autocast, dtype_of

BACKENDS: Any = torch.backends
NEW = hasattr(BACKENDS.cuda.matmul, "fp32_precision")


def readable(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except RuntimeError:  # torch refuses to say, because two interfaces were mixed
        return "unreadable"


def settings() -> list[Any]:
    found = [
        readable(torch.get_float32_matmul_precision),
        readable(lambda: BACKENDS.cudnn.allow_tf32),
        readable(lambda: BACKENDS.cuda.matmul.allow_tf32),
        BACKENDS.cudnn.benchmark,
    ]
    if NEW:
        operations = BACKENDS.cuda.matmul, BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn, BACKENDS.mkldnn.matmul
        found += [operation.fp32_precision for operation in operations]
    return found


def nothing() -> None:
    pass


def one_operation() -> None:
    BACKENDS.cudnn.conv.fp32_precision = "ieee"
    BACKENDS.cuda.matmul.fp32_precision = "tf32"


def everything() -> None:
    BACKENDS.fp32_precision = "tf32"


def older() -> None:
    BACKENDS.cuda.matmul.allow_tf32 = True
    BACKENDS.cudnn.allow_tf32 = False


def medium() -> None:
    torch.set_float32_matmul_precision("medium")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    if NEW:
        BACKENDS.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    BACKENDS.cudnn.allow_tf32 = True
    if NEW:
        BACKENDS.cuda.matmul.fp32_precision = BACKENDS.mkldnn.matmul.fp32_precision = "none"


@pytest.mark.parametrize("caller", [nothing, older, medium, *([one_operation, everything] if NEW else [])])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_tf32_is_on_for_tf32_only_and_the_caller_s_settings_are_restored(
    caller: Callable[[], None], precision: Any
) -> None:
    caller()
    before = settings()
    with arithmetic(precision):
        assert BACKENDS.cuda.matmul.allow_tf32 == (precision == "tf32")
        assert BACKENDS.cudnn.allow_tf32 == (precision == "tf32")
        assert torch.get_float32_matmul_precision() == ("high" if precision == "tf32" else "highest")
        if NEW:
            for operation in (BACKENDS.cuda.matmul, BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn):
                assert (operation.fp32_precision == "tf32") == (precision == "tf32")
            assert precision == "tf32" or BACKENDS.mkldnn.matmul.fp32_precision in ("none", "ieee")
    assert [now for now, then in zip(settings(), before, strict=True) if then != "unreadable"] == [
        then for then in before if then != "unreadable"
    ]


def test_settings_are_restored_after_an_error_and_when_contexts_are_nested() -> None:
    before = settings()
    with arithmetic("tf32"):
        within = settings()
        with suppress(KeyError), arithmetic("float32"):
            assert not BACKENDS.cudnn.allow_tf32
            raise KeyError
        assert settings() == within
    assert settings() == before


def test_cudnn_looks_for_the_fastest_convolution_unless_runs_must_repeat() -> None:
    with arithmetic("float32"):
        assert BACKENDS.cudnn.benchmark
    with arithmetic("float32", deterministic=True):
        assert not BACKENDS.cudnn.benchmark


@pytest.mark.parametrize("precision", PRECISIONS)
def test_products_are_computed_in_the_type_of_the_precision(precision: Any) -> None:
    x = torch.ones(2, 2)
    with autocast(precision, x.device):
        assert (x @ x).dtype == dtype_of(precision)
        assert (x.double() @ x.double()).dtype == torch.float64


def test_float32_changes_no_bit_on_a_cpu() -> None:
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(4, 8, 9, 9, generator=g), torch.randn(8, 8, 3, 3, generator=g)

    def results() -> tuple[Tensor, Tensor]:
        return torch.conv2d(x, w), x.flatten(1) @ x.flatten(1).T

    plain = results()
    with arithmetic("float32"), autocast("float32", x.device):
        assert all(map(torch.equal, results(), plain))


def test_an_unknown_precision_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="one of float32, tf32, bfloat16, float16, not 'half'"):
        dtype_of("half")
