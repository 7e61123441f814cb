"""Test setup: annotated shapes and types are checked in every call, torch uses one thread, caches are temporary."""

import os
import signal
import sys
from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from pretend_gpu import RealGPU

jaxtyping.install_import_hook("stablefield", "typechecker.checked")
signal.signal(signal.SIGINT, signal.default_int_handler)  # they are ignored in background jobs,
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and what a process ignores, a run ignores
torch.set_num_threads(1)  # more threads only wait for each other on tensors this small
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same in processes that tests start


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--gpu", action="store_true", help="compare the CPU with the GPU of this machine, not a pretended one"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--gpu"):
        if not torch.cuda.is_available():
            raise pytest.UsageError("--gpu: PyTorch finds no CUDA GPU on this machine")
        RealGPU.chosen = True


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Disable those checks, to test the error messages for wrong arguments."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True, scope="session")
def no_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A temporary cache for all tests: data are decoded and classifiers trained once, and nothing is left behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STABLEFIELD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def fidelity() -> object:
    """torch-fidelity if installed; defines two operators of torchvision where torchvision does not fit this torch."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pytest.skip("needs torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
    return pytest.importorskip("torch_fidelity"), locals()  # keep a reference, or the operators are removed
