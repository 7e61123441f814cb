"""Shapes and types written in annotations are checked in every call that the tests make."""

from collections.abc import Iterator

import jaxtyping
import pytest

jaxtyping.install_import_hook("stablefield", "typechecker.checked")


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without those checks: to see what a user is told who passes something wrong."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
