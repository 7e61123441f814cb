"""Map-style PyTorch data sets become pools, in memory or mapped from a store, with the same data points and labels."""

import numpy as np
import pytest
import torch
from data_files import noise
from PIL import Image

from stablefield.data import DatasetSource, ShuffledBatches

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("STABLEFIELD_CACHE", str(tmp_path / "cache"))


IMAGES, LABELS = noise(7, 3, 4, 5), [2, 0, 1, 1, 2, 0, 0]
ITEMS = {
    "x": [torch.from_numpy(x) for x in IMAGES],
    "arrays": list(zip(IMAGES, LABELS, strict=True)),
    "tensors": [(torch.from_numpy(x), torch.tensor(n)) for x, n in zip(IMAGES, LABELS, strict=True)],
    "dictionaries": [{"image": x, "label": np.int64(n)} for x, n in zip(IMAGES, LABELS, strict=True)],
    "pillow": [(Image.fromarray(x.transpose(1, 2, 0)), n) for x, n in zip(IMAGES, LABELS, strict=True)],
}


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("kind", ITEMS)
def test_items_of_every_form_become_data_points_and_labels(kind, mapped, tmp_path):
    source = DatasetSource(ITEMS[kind], store=tmp_path / "store" if mapped else None)
    for _ in range(2):  # a store is used again
        pool = source.load()
        assert np.array_equal(pool.data.numpy(), IMAGES)
        assert pool.labels is None if kind == "x" else pool.labels.tolist() == LABELS
    batch = ShuffledBatches(pool, 4)(0)
    assert torch.equal(batch.x, pool.take(batch.index))


def test_floats_keep_their_values_and_labels_with_gaps_are_numbered_again():
    x = torch.randn(5, 2)
    pool = DatasetSource(torch.utils.data.TensorDataset(x.double(), torch.tensor([5, 1, 5, 9, 1]))).load()
    assert torch.equal(pool.data, x.double().float())
    assert pool.labels.tolist() == [1, 0, 1, 2, 0]


class Random(torch.utils.data.Dataset):
    """Data set whose items are random, as random augmentation makes them."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.randn(3)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Random(), "differs each time; remove random augmentation"),
        ([], "is empty"),
        ([{"pixels": IMAGES[0]}], "no key 'image'; its keys are pixels"),
        ([np.zeros(3, np.int64)], "is int64; it must be uint8 or floating"),
        ([np.zeros(3), np.zeros(4)], r"data point 1 is float32 \(4,\), the first float32 \(3,\)"),
        ([(np.zeros(3), 0), (np.zeros(3), None)], "data point 1 has the label None"),
        ([np.full(3, np.nan)], "not finite"),
    ],
)
def test_data_sets_that_cannot_be_used_are_refused(dataset, message):
    with pytest.raises(ValueError, match=message):
        DatasetSource(dataset).load()


def test_a_store_of_other_data_is_not_used(tmp_path):
    DatasetSource(ITEMS["x"], store=tmp_path / "store").load()
    for other in (ITEMS["x"][::-1], ITEMS["x"][:-1]):
        with pytest.raises(ValueError, match="store of other data"):
            DatasetSource(other, store=tmp_path / "store").load()
