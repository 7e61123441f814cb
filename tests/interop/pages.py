"""The code of the pages in docs/loops: python blocks, diffs of scripts, and both sides of a diff."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

LOOPS = Path(__file__).parents[2] / "docs" / "loops"


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, code) of the python and diff blocks of a page."""
    return re.findall(r"^```(python|diff)\n(.*?)^```", (LOOPS / page).read_text(), re.DOTALL | re.MULTILINE)


def sides(diff: str) -> tuple[str, str]:
    """The script before and after a diff."""
    lines = diff.splitlines()
    return tuple("\n".join(line[1:] for line in lines if line[:1] != skipped) for skipped in "+-")


def run(code: str, names: dict[str, Any]) -> dict[str, Any]:
    """The names after code ran, from a fixed seed, in a copy of some names."""
    names = dict(names)
    torch.manual_seed(0)
    exec(compile(code, "page", "exec"), names)
    return names


def scripts(page: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(before, after, names) of each diff; the python blocks above it have defined the names."""
    names: dict[str, Any] = {}
    for language, code in blocks(page):
        if language == "python":
            names = run(code, names)
        else:
            yield *sides(code), dict(names)


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [value.detach().clone() for value in model.state_dict().values()]


def calls(names: dict[str, Any]) -> int:
    """Number of calls of the script's stable target, on its own or in an adapter."""
    return getattr(names["stable"], "stable", names["stable"]).calls


def check(page: str, number: int, steps: int = 50) -> None:
    """Both sides of a diff run at least `steps` steps; with one candidate they train the same weights."""
    before, after, names = list(scripts(page))[number]
    plain = run(before, names)
    stable = run(after, names)
    assert calls(stable) >= steps
    one, count = re.subn(r"\bsize=\d+", "size=1", after)
    assert count == 1
    single = run(one, names)
    assert calls(single) == calls(stable)
    for found, wanted in zip(weights(single["model"]), weights(plain["model"]), strict=True):
        assert torch.equal(found, wanted)
    different = [not torch.equal(a, b) for a, b in zip(weights(stable["model"]), weights(plain["model"]), strict=True)]
    assert any(different)
