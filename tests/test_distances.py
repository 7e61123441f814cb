"""Laws of the distances that are kept: measured once, of these data only, and none that are damaged or of others."""

from pathlib import Path

import pytest
import torch

import stablefield.data.distances
from stablefield import Pool, PrunedDataset
from stablefield.checkpoint import read, save
from stablefield.config import resolve
from stablefield.data import NeighbourDistances
from stablefield.neighbours import nearest
from stablefield.run import assemble


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STABLEFIELD_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The labels that were measured and not found."""
    seen: list[int] = []

    def watched(pool: Pool, label: int, **how: object) -> torch.Tensor:
        seen.append(label)
        return nearest(pool, label, **how)

    monkeypatch.setattr(stablefield.data.distances, "nearest", watched)
    return seen


def pool(seed: int = 0) -> Pool:
    g = torch.Generator().manual_seed(seed)
    return Pool(torch.randn(40, 3, generator=g), torch.randint(2, (40,), generator=g))


def files(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.safetensors"))


def test_distances_are_measured_once_for_each_class(cache: Path, measured: list[int]) -> None:
    for _ in range(2):
        distances = NeighbourDistances(pool()).prepare()
        for label in (0, 1):
            torch.testing.assert_close(distances(label), nearest(pool(), label))
    assert measured == [0, 1]
    assert len(files(cache)) == 2


def test_other_data_have_other_distances(cache: Path, measured: list[int]) -> None:
    for seed in (0, 1):
        torch.testing.assert_close(NeighbourDistances(pool(seed))(0), nearest(pool(seed), 0))
    torch.testing.assert_close(NeighbourDistances(pool(), k=4)(0), nearest(pool(), 0, k=4))
    assert measured == [0, 0, 0]


@pytest.mark.parametrize("how", ["cut short", "of other data", "no file of ours"])
def test_a_file_that_is_not_of_these_data_is_measured_again(how: str, cache: Path, measured: list[int]) -> None:
    NeighbourDistances(pool())(0)
    (file,) = files(cache)
    match how:
        case "cut short":
            file.write_bytes(file.read_bytes()[:-8])
        case "of other data":
            kept = read(file)
            save(file, {"distances": kept.tensors["distances"] + 1}, config=kept.config | {"data": "0" * 64}, images=0)
        case _:
            file.write_text("something else")
    torch.testing.assert_close(NeighbourDistances(pool())(0), nearest(pool(), 0))
    assert measured == [0, 0]
    NeighbourDistances(pool())(0)
    assert measured == [0, 0]


def test_a_run_with_the_pruned_target_has_them_before_it_begins(cache: Path, measured: list[int]) -> None:
    config = resolve({"target": {"kind": "pruned", "dims": 8}, "network": {"kind": "mlp"}})
    parts = assemble(config)
    assert isinstance(parts.objective.target, PrunedDataset)
    assert parts.objective.target.dims == 8
    assert repr(parts.objective.target).endswith("uint8), lost=1e-08, dims=8, sharded=False, at_once=1024)")
    assert measured == [-1]
    assert config["target"] == {"kind": "pruned", "lost": 1e-8, "dims": 8, "sharded": False, "at_once": 1024}
