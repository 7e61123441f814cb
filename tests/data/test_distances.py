"""Laws of the cached distances: measured once for a data set, and again if a file is damaged or of other data."""

from pathlib import Path

import pytest
import torch

import stablefield.data.distances
from stablefield import ExactTarget, Pool
from stablefield.build import build
from stablefield.checkpoint import read, save
from stablefield.config import resolve
from stablefield.data.distances import NeighbourDistances
from stablefield.targets import Prefetched
from stablefield.targets.isolation import nearest_distances


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STABLEFIELD_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The labels whose distances were measured instead of read from the cache."""
    labels: list[int] = []

    def recorded(pool: Pool, label: int, **options: object) -> torch.Tensor:
        labels.append(label)
        return nearest_distances(pool, label, **options)

    monkeypatch.setattr(stablefield.data.distances, "nearest_distances", recorded)
    return labels


def pool(seed: int = 0) -> Pool:
    g = torch.Generator().manual_seed(seed)
    return Pool(torch.randn(40, 3, generator=g), torch.randint(2, (40,), generator=g))


def files(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.safetensors"))


def test_distances_are_measured_once_for_each_class(cache: Path, measured: list[int]) -> None:
    for _ in range(2):
        distances = NeighbourDistances(pool()).prepare()
        for label in (0, 1):
            torch.testing.assert_close(distances(label), nearest_distances(pool(), label))
    assert measured == [0, 1]
    assert len(files(cache)) == 2


def test_distances_of_other_data_or_another_k_are_measured(cache: Path, measured: list[int]) -> None:
    for seed in (0, 1):
        torch.testing.assert_close(NeighbourDistances(pool(seed))(0), nearest_distances(pool(seed), 0))
    torch.testing.assert_close(NeighbourDistances(pool(), k=4)(0), nearest_distances(pool(), 0, k=4))
    assert measured == [0, 0, 0]


@pytest.mark.parametrize("damage", ["truncated", "of other data", "not a checkpoint"])
def test_distances_are_measured_again_if_their_file_is_damaged_or_of_other_data(
    damage: str, cache: Path, measured: list[int]
) -> None:
    NeighbourDistances(pool())(0)
    (file,) = files(cache)
    match damage:
        case "truncated":
            file.write_bytes(file.read_bytes()[:-8])
        case "of other data":
            found = read(file)
            other = found.config | {"data": "0" * 64}
            save(file, {"distances": found.tensors["distances"] + 1}, config=other, images=0)
        case _:
            file.write_text("something else")
    torch.testing.assert_close(NeighbourDistances(pool())(0), nearest_distances(pool(), 0))
    assert measured == [0, 0]
    NeighbourDistances(pool())(0)
    assert measured == [0, 0]


def test_a_run_with_the_exact_target_measures_distances_before_it_starts(cache: Path, measured: list[int]) -> None:
    config = resolve({"target": {"kind": "exact", "projection_dims": 8}, "network": {"kind": "mlp"}})
    target = build(config).objective.target
    assert isinstance(target, Prefetched)
    assert isinstance(target.target, ExactTarget)
    assert target.target.projection_dims == 8
    assert repr(target).endswith("uint8), missing_mass=1e-08, projection_dims=8), examples=1024)")
    assert measured == [-1]
    assert config.sections["target"] == {"kind": "exact", "missing_mass": 1e-8, "projection_dims": 8}


def test_a_run_that_streams_all_data_measures_no_distances(cache: Path, measured: list[int]) -> None:
    build(resolve({"target": {"kind": "exact", "missing_mass": 0.0}, "network": {"kind": "mlp"}}))
    assert measured == []


def test_distances_are_measured_before_a_run_only_if_that_is_quick(measured: list[int], monkeypatch) -> None:
    data = pool()
    sizes = [len(data.indices(label)) for label in (0, 1)]
    products = sum(size**2 for size in sizes) / 2 * data.data[0].numel()
    monkeypatch.setattr(stablefield.data.distances, "MOST_PRODUCTS", products - 1)
    assert NeighbourDistances(data).prepare() is None
    assert measured == []
    monkeypatch.setattr(stablefield.data.distances, "MOST_PRODUCTS", products)
    assert NeighbourDistances(data).prepare(null_label=True) is None  # among all data there are more pairs
    assert NeighbourDistances(data).prepare() is not None
    assert measured == [0, 1]
