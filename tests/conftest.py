"""Shapes and types written in annotations are checked in every call that the tests make, on one thread."""

import sys
from collections.abc import Iterator

import jaxtyping
import pytest
import torch

jaxtyping.install_import_hook("stablefield", "typechecker.checked")
torch.set_num_threads(1)  # over tensors this small a team mostly waits for its last member, on a busy machine for long


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without those checks: to see what a user is told who passes something wrong."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True, scope="session")
def no_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is decoded or trained once is so once for all tests, and leaves nothing behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STABLEFIELD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def fidelity() -> object:
    """torch-fidelity, if it is there; it only needs the names of two operators of torchvision, which may not fit."""
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
    return pytest.importorskip("torch_fidelity"), locals()  # the library lives as long as somebody holds it
