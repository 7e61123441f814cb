"""The rule of `training.compile = "auto"`: when a run compiles its network, and that it does what it did before."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend_gpu import PretendGPU
from short_runs import configured, trained
from torch import Tensor, nn

from stablefield.build import build
from stablefield.data import say
from stablefield.distributed import Ranks
from stablefield.engine.compilation import decide_compile, reason_against
from stablefield.precision import autocast
from stablefield.run import RunFolder


class Network(nn.Module):
    """A network of the user's: torch does not compile a bare `nn.Sequential`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).sigmoid())


def reason(
    *, step: float, compilation: float, repeats: float, backend: Any = "eager", precision: str = "float32"
) -> str:
    """The reason against compiling, by a clock that shows these durations."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        network, x = Network(), torch.randn(4, 8)
    times = iter((0.0, step, 2 * step + compilation))

    def gradient(precision: str) -> list[Tensor]:
        with autocast(precision, x.device):
            loss = network(x).square().mean()
        return list(torch.autograd.grad(loss, list(network.parameters())))

    found = reason_against(gradient, [network], precision, repeats, lambda: next(times), backend)
    assert network._compiled_call_impl is None
    return found


def changed_by(factor: float) -> Callable[..., Any]:
    """A backend whose results are off by a factor."""
    return lambda graph, inputs: lambda *args: [factor * each for each in graph(*args)]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_runs_ten_times_as_long_as_the_compilation_compile(precision: str) -> None:
    assert reason(step=1.0, compilation=59.0, repeats=600, precision=precision) == ""
    assert reason(step=1.0, compilation=61.0, repeats=600) == "compiling takes 61 s, and the run about 600 s"


def test_nothing_is_compiled_for_a_run_of_a_minute() -> None:
    def never(graph: Any, inputs: Any) -> Any:
        raise AssertionError

    assert reason(step=0.1, compilation=0.0, repeats=600, backend=never) == "the run takes about 60 s"


def test_a_compiler_that_fails_or_is_wrong_is_not_used() -> None:
    def fails(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler\nhere")

    long = {"step": 1.0, "compilation": 1.0, "repeats": 600.0}
    assert "no compiler" in reason(**long, backend=fails)
    assert "off by" in reason(**long, backend=changed_by(1.01))
    assert "off by nan" in reason(**long, backend=changed_by(float("nan")))
    # bfloat16 itself rounds by more than that
    assert reason(**long, backend=changed_by(1.0005), precision="bfloat16") == ""


def test_a_run_on_a_cpu_is_not_compiled_and_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    say.cache_clear()
    with caplog.at_level(logging.WARNING):
        trained(tmp_path, "training.compile=auto", "training.images=32")
    assert "compile=auto: not compiled, because that is tried on CUDA only, not on cpu" in caplog.text
    assert "\ncompile = false\n" in RunFolder(tmp_path).config.read_text()


@pytest.mark.parametrize("before", [True, False])
def test_a_resumed_run_compiles_if_it_did_before(before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda network: compiled.append(network))
    trained(tmp_path, f"training.compile={str(before).lower()}", "training.images=32")
    assert len(compiled) == before
    monkeypatch.setattr("stablefield.engine.compilation.reason_against", None)  # nothing is tried again
    trained(tmp_path, "training.compile=auto", "training.images=64")
    assert len(compiled) == 2 * before
    assert f"\ncompile = {str(before).lower()}\n" in RunFolder(tmp_path).config.read_text()


@pytest.mark.parametrize("against", ["", "it is slow"])
def test_a_new_run_on_a_gpu_tries_the_gradient_of_its_first_micro_batch(
    against: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["training.compile=auto", "training.images=6400", "training.micro_batch_size=16"]
    config = configured(*settings, "training.conditional=true", "training.device=cuda")
    tried = []

    def record(gradient: Any, networks: Any, precision: str, repeats: float, clock: Callable[[], float]) -> str:
        tried.append((precision, repeats, clock() <= clock()))
        assert networks == [parts.denoiser.network]
        one, other = gradient("float32"), gradient("float32")
        torch.testing.assert_close(one, other, rtol=0, atol=0)
        assert all(each.is_cuda and each.isfinite().all() for each in one)
        assert len(one) == len(list(parts.denoiser.parameters()))
        return against

    monkeypatch.setattr("stablefield.engine.compilation.reason_against", record)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    with PretendGPU() as gpu:
        parts = build(config)
        decided = decide_compile(config, parts, RunFolder(tmp_path), Ranks(next(parts.denoiser.parameters()).device))
    assert not gpu.mistakes
    assert tried == [("float32", 400, True)]
    assert decided.training.compile is (not against)
    assert all(p.grad is None for p in parts.denoiser.parameters())
