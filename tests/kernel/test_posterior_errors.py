"""Errors of `posterior`: wrong arguments are refused by name."""

from typing import Any

import numpy as np
import pytest
import torch

from stablefield import VE, NoisyBatch, posterior
from stablefield.kernel.gaussian import stream


def wrong(**changes: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    x_t, support = torch.randn(4, 3, 2, generator=g), torch.randn(7, 3, 2, generator=g)
    return {"x_t": x_t, "support": support, "sigma": 1.0} | changes


NOT_FINITE = torch.full((4, 3, 2), float("nan"))
LABELS = torch.zeros(4, dtype=torch.int64), torch.ones(7, dtype=torch.int64)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"support": torch.zeros(7, 3, 3)}, r"\(4, 3, 2\).*\(7, 3, 3\)"),
        ({"support": torch.zeros(3, 7, 3, 2)}, r"\(4, 3, 2\).*\(3, 7, 3, 2\)"),
        ({"support": torch.zeros(7, 6)}, r"\(4, 3, 2\).*\(7, 6\)"),
        ({"x_t": torch.zeros(4), "support": torch.zeros(7)}, r"at least one dimension.*\(4,\)"),
        ({"source": torch.zeros(3, 3, 2)}, r"\(4, 3, 2\).*\(3, 3, 2\)"),
        ({"support": torch.zeros(0, 3, 2)}, "support is empty"),
        ({"support": torch.zeros(4, 0, 3, 2)}, "support is empty"),
        ({"support": torch.zeros(7, 3, 2, dtype=torch.uint8)}, "support is torch.uint8"),
        ({"x_t": torch.zeros(4, 3, 2, dtype=torch.int64)}, "x_t is torch.int64"),
        ({"source": torch.zeros(4, 3, 2, dtype=torch.int32)}, "source is torch.int32"),
        ({"support": torch.zeros(7, 3, 2, device="meta")}, "support is on meta, but x_t is on cpu"),
        ({"source": torch.zeros(4, 3, 2, device="meta")}, "source is on meta, but x_t is on cpu"),
        ({"sigma": -0.1}, "sigma.*not negative; example 0 has -0.1"),
        ({"sigma": torch.tensor([1, 2, -3, 4.0])}, "sigma.*example 2 has -3"),
        ({"sigma": float("nan")}, "sigma must be finite.*nan"),
        ({"sigma": float("inf")}, "sigma must be finite.*inf"),
        ({"sigma": torch.ones(4, 1, 1)}, r"sigma.*\(4,\).*\(4, 1, 1\)"),
        ({"sigma": torch.ones(3)}, r"sigma.*\(4,\).*\(3,\)"),
        ({"alpha": torch.ones(1, 4)}, r"alpha.*\(4,\).*\(1, 4\)"),
        ({"alpha": float("nan")}, "alpha must be finite"),
        ({"x_t": NOT_FINITE}, "x_t is not finite in example 0"),
        ({"x_t": torch.zeros(4, 3, 2).index_fill_(0, torch.tensor(2), torch.inf)}, "x_t is not finite in example 2"),
        ({"support": torch.full((7, 3, 2), torch.inf)}, "support or the source holds numbers that are not finite"),
        ({"source": NOT_FINITE}, "support or the source holds numbers that are not finite"),
        ({"source": NOT_FINITE, "sigma": 0.0}, "support or the source holds numbers that are not finite"),
        ({"source": NOT_FINITE, "alpha": 0.0}, "support or the source holds numbers that are not finite"),
        ({"allowed": torch.ones(4, 6, dtype=torch.bool)}, r"\(4, 7\).*\(4, 6\)"),
        ({"allowed": torch.ones(4, 7)}, r"bool mask \(4, 7\), not torch.float32"),
        ({"allowed": (torch.zeros(3), torch.zeros(7))}, r"4 labels of examples and 7 of candidates, not \(3, 7\)"),
        ({"allowed": torch.tensor([1, 1, 1, 0]).bool()[:, None].expand(4, 7)}, "example 3 is allowed"),
        ({"allowed": LABELS}, "example 0 is allowed"),
        ({"support": np.zeros((7, 3, 2))}, "support must be a tensor, not ndarray"),
        ({"x_t": [0.0]}, "x_t must be a tensor, not list"),
        ({"x_t": None}, "x_t must be a tensor, not None"),
        ({"support": None}, "support must be a tensor, not None"),
        ({"source": [[0.0]]}, "source must be a tensor, not list"),
        ({"x_t": torch.zeros(4, 3, 2).to_sparse()}, "x_t must be dense, not torch.sparse_coo; pass x_t.to_dense"),
        ({"source": torch.zeros(4, 3, 2, dtype=torch.complex64)}, "source must be real, not torch.complex64"),
        ({"x_t": torch.zeros(4, 3, 2, dtype=torch.bool)}, "x_t is torch.bool"),
        ({"sigma": None}, "sigma must be a number or a tensor, not NoneType"),
        ({"sigma": [1.0, 2.0, 3.0, 4.0]}, "sigma must be a number or a tensor, not list"),
        ({"sigma": np.ones(4)}, "sigma must be a number or a tensor, not ndarray"),
        ({"alpha": 1j}, "alpha must be a number or a tensor, not complex"),
        ({"alpha": True}, "alpha must be a number or a tensor, not bool"),
        ({"alpha": torch.ones(4, dtype=torch.bool)}, "alpha must hold numbers, not torch.bool"),
        ({"sigma": torch.ones(4, dtype=torch.complex64)}, "sigma must be real, not torch.complex64"),
        ({"sigma": torch.ones(4).to_sparse()}, "sigma must be dense"),
        ({"allowed": np.ones((4, 7), dtype=bool)}, "allowed must be a tensor, not ndarray"),
        ({"allowed": [True]}, "allowed must be a tensor, not list"),
        ({"allowed": torch.ones(4, 7, dtype=torch.bool).to_sparse()}, "allowed must be dense"),
        ({"allowed": (torch.zeros(4),)}, "two tensors of labels, not a tuple of 1"),
        ({"allowed": (torch.zeros(4), [0] * 7)}, r"allowed\[1\] must be a tensor, not list"),
        ({"chunk": 0}, "chunk must be at least 1.*0"),
        ({"chunk": -1}, "chunk must be at least 1.*-1"),
    ],
)
def test_wrong_arguments_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        posterior(**wrong(**changes))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["x_t", "support", "source"])
@pytest.mark.parametrize("scales", [{"sigma": 0.0}, {"sigma": 1.0, "alpha": 0.0}, {"sigma": 1e-3}, {"sigma": 1e30}])
def test_a_single_non_finite_number_is_refused(where: str, bad: float, scales: dict[str, float]) -> None:
    inputs = wrong(source=torch.zeros(4, 3, 2), **scales)
    inputs[where] = inputs[where].clone()
    inputs[where][2, 1, 1] = bad
    with pytest.raises(ValueError, match="finite"):
        posterior(**inputs, chunk=2)


@pytest.mark.usefixtures("unchecked")
def test_blocks_of_another_shape_are_refused_even_with_as_many_numbers() -> None:
    noisy: NoisyBatch = VE().perturb(torch.zeros(2, 3, 4), torch.ones(2), torch.zeros(2, 3, 4))
    for candidates in (torch.zeros(5, 4, 3), torch.zeros(5, 12), torch.zeros(2, 5, 4, 3)):
        with pytest.raises(ValueError, match=r"\(2, 3, 4\)"):
            stream(noisy.x_t, [(candidates, None)], sigma=1.0)
