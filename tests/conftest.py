"""Shapes and types written in annotations are checked in every call that the tests make, on one thread."""

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
