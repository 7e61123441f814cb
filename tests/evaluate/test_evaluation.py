"""`evaluate` and `sample_to` from Python: typed results, nothing printed, and the same scores as the command's."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from stablefield.build import build_sampler
from stablefield.cli import app
from stablefield.config import ConfigError
from stablefield.data import Images, StageProgress, silent_stage
from stablefield.data.png import encode_png
from stablefield.evaluate import (
    Estimate,
    Reference,
    Statistics,
    evaluate,
    feature_statistics,
    frechet_distance,
)
from stablefield.evaluate.features import Features
from stablefield.evaluate.metrics import METRICS
from stablefield.generate import SampleStore, SamplingPlan, sample_to
from stablefield.generate.images import save_sheet, to_pixels
from stablefield.pool import Pool
from stablefield.run import open_run

pytestmark = pytest.mark.usefixtures("unchecked")


def normal(n: int, seed: int, d: int = 5) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def command(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on images of three classes."""
    folder = tmp_path_factory.mktemp("conditional")
    x = np.random.default_rng(0).integers(0, 256, (60, 1, 8, 8), dtype=np.uint8)
    np.savez(folder / "data.npz", data=x, labels=np.arange(60) % 3)
    settings = ["training.images=64", "training.batch_size=32", "target.size=8", "network.channels=8"]
    settings += ["network.blocks=1", "training.conditional=true", "sampler.steps=3"]
    flags = [part for setting in settings for part in ("--set", setting)]
    command("train", "--data", folder / "data.npz", "--out", folder / "run", *flags)
    return folder / "run"


def test_an_estimate_has_the_standard_error_of_its_mean():
    found = Estimate.from_values([1.0, 2.0, 3.0, 6.0])
    assert (found.mean, found.n, found.min) == (3.0, 4, 1.0)
    assert found.std == pytest.approx(torch.tensor(found.values).std().item())
    assert found.error == pytest.approx(found.std / 2)
    assert Estimate.from_values([3.0]).error is None
    with pytest.raises(ValueError, match=r"not finite: 1\.0, nan"):
        Estimate.from_values([1.0, float("nan")])


def test_tensors_pools_and_statistics_give_the_distance_of_their_features(capfd):
    x, y = normal(300, 0), 2 * normal(400, 1)
    expected = frechet_distance(Statistics.from_features(x), Statistics.from_features(y))
    for samples in (x, Pool(x)):
        for reference in (y, Pool(y), Reference("y", Pool(y)), Statistics.from_features(y)):
            scores = evaluate(samples, reference, features="pixels", metrics=["frechet"])
            assert scores["frechet"].mean == pytest.approx(expected, rel=1e-9)
            assert scores["frechet"].std is None
    assert capfd.readouterr() == ("", "")


def test_metrics_choose_the_scores_that_are_computed():
    x, y = normal(50, 0), normal(60, 1)
    whole = evaluate(x, y)
    assert set(whole.means()) >= {"frechet", "kernel", "kernel_std", "precision", "recall", "copies", "nearest_ratio"}
    for metric in METRICS:
        some = evaluate(x, y, metrics=[metric]).means()
        assert some.items() <= whole.means().items()
    with pytest.raises(ValueError, match="unknown metric fid; choose from frechet"):
        evaluate(x, y, metrics=["fid"])
    with pytest.raises(KeyError, match="no score 'fid'; there are frechet"):
        whole["fid"]


class Counted(Features):
    """The data themselves, and the number of data points that were asked for."""

    name = identity = "counted"

    def __init__(self) -> None:
        self.count = 0

    def compute(self, x):
        self.count += len(x)
        return x


def test_a_reference_is_reduced_to_features_once():
    reference, features = Reference("y", Pool(normal(60, 1))), Counted()
    first = evaluate(normal(50, 0), reference, features=features)
    assert features.count == 110
    assert evaluate(normal(50, 0), reference, features=features).means() == first.means()
    assert features.count == 160
    other = evaluate(normal(50, 0), reference, features=features, held_out=normal(40, 2))
    assert other["nearest_distance_held_out"] != first["nearest_distance_held_out"]


def test_every_table_is_reported_as_soon_as_it_is_computed():
    seen, stages = [], []

    def stage(title: str) -> StageProgress:
        stages.append(title)
        return silent_stage(title)

    found = evaluate(normal(50, 0), normal(60, 1), on_table=seen.append, progress=stage)
    assert seen == list(found.tables)
    assert stages[-1] == "nearest"


def test_statistics_of_samples_are_a_reference():
    x, y = normal(50, 0), normal(60, 1)
    statistics = feature_statistics(y)
    assert (statistics.n, statistics.features) == (60, "pixels")
    by_statistics = evaluate(x, statistics).means()
    assert by_statistics == {"frechet": evaluate(x, y)["frechet"].mean}
    with pytest.raises(ConfigError, match="in features pixels and cannot be compared in counted"):
        evaluate(x, statistics, features=Counted())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "there is no reference"),
        ({"reference": normal(9, 0, 4)}, r"shape \(5,\) cannot be compared"),
        ({"reference": normal(9, 0), "seeds": range(4)}, "seeds are for runs"),
        ({"reference": normal(9, 0), "repeats": 2}, "2 repeats need new samples"),
        ({"reference": normal(9, 0), "count": 99}, "fewer than --samples 99"),
        ({"reference": "nowhere"}, "there is no file or folder nowhere"),
        ({"reference": normal(9, 0), "features": "nowhere"}, "there is no file nowhere"),
        ({"reference": Statistics.from_features(normal(9, 0)), "held_out": normal(9, 0)}, "needs data, not statistics"),
    ],
)
def test_contradictory_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate(normal(20, 1), **arguments)
    with pytest.raises(ValueError, match="at least 2"):
        evaluate(normal(1, 1), normal(9, 0))


def test_a_run_has_the_scores_of_the_command(run, tmp_path):
    plan = SamplingPlan.for_run(run, steps=2)
    ours = evaluate(plan, count=12, repeats=2, features="pixels", keep=tmp_path / "kept")
    command("evaluate", run, "--samples", 12, "--repeats", 2, "--features", "pixels", "--steps", 2)
    theirs = [json.loads(line) for line in (run / "scores.jsonl").read_text().splitlines()]
    records = json.loads(json.dumps([table.record() for table in ours.tables]))
    assert [record | {"date": ""} for record in records] == [line | {"date": ""} for line in theirs]
    again = evaluate(open_run(run), count=4, features="pixels", metrics=["frechet"])
    by_path = evaluate(run / "checkpoint.safetensors", count=4, features="pixels", metrics=["frechet"])
    assert again.means() == by_path.means()


# --- samples on disk --------------------------------------------------------------------------------------------------


def test_samples_of_a_conditional_run_keep_their_classes(run, tmp_path):
    plan = SamplingPlan.for_run(run)
    expected = plan.sampler(plan.denoiser, (1, 8, 8), seeds=range(6)).label.tolist()
    assert len(set(expected)) > 1
    folder, archive = (sample_to(plan, tmp_path / name, seeds=range(6)) for name in ("images", "x.npz"))
    assert folder.labels(range(6)) == archive.labels(range(6)) == expected
    listed = json.loads((tmp_path / "images" / "dataset.json").read_text())["labels"]
    assert listed == [[f"000000/{seed:06d}.png", label] for seed, label in enumerate(expected)]
    assert np.load(tmp_path / "x.npz")["labels"].tolist() == expected
    pool = Images(tmp_path / "images").load()  # what reads folders finds the samples, and nothing but them
    assert pool.labels.tolist() == expected
    assert torch.equal(pool.take(torch.arange(6)), folder.take(range(6)))
    assert folder.sheet == tmp_path / "images.png"
    assert folder.sheet.is_file()


def test_samples_without_classes_are_one_class_however_many_folders_they_have(run, tmp_path):
    store = SampleStore.open(tmp_path / "x", True, {})
    samples = build_sampler(open_run(run).config)(open_run(run).denoiser, (1, 8, 8), seeds=range(3), label=-1)
    store.add([0, 1000, 2000], samples)
    store.finish(store.seeds())
    assert json.loads((tmp_path / "x" / "dataset.json").read_text()) == {"labels": None}
    assert Images(tmp_path / "x").load().labels is None


@pytest.mark.parametrize("seeds", [[0, 2**32], [-1], [3, 4, 3], [], range(2**32, 2**32 + 2)])
def test_seeds_that_would_give_the_same_sample_are_refused(run, tmp_path, seeds):
    with pytest.raises(ValueError, match=r"seeds must be from 0 to 4294967295|more than once|no seeds"):
        sample_to(run, tmp_path / "x", seeds=seeds)
    with pytest.raises(ValueError, match="seeds must be from 0"):
        evaluate(run, seeds=[2**32 - 2], repeats=3, keep=tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["x", "x.npz"])
@pytest.mark.parametrize("keep", [0, 1, 30, -1])
def test_a_sample_that_was_cut_short_is_made_again(run, tmp_path, name, keep):
    store = sample_to(run, tmp_path / name, seeds=range(4))
    before = store.take(range(4))
    path = store.path(2)
    path.write_bytes(path.read_bytes()[:keep])
    assert store.missing(range(5)) == [2, 4]
    again = sample_to(run, tmp_path / name, seeds=range(4))
    assert not again.missing(range(4))
    assert (again.take(range(4)) - before).abs().max() <= 1.01 / 127.5


def test_temporary_files_of_a_killed_process_are_removed_and_never_read(run, tmp_path):
    store = sample_to(run, tmp_path / "x", seeds=range(2))
    left = store.path(0).with_name(".tmp-0123456789ab.000005.png")
    left.mkdir()
    (left / "5").write_bytes(b"half")
    assert store.seeds() == [0, 1]
    sample_to(run, tmp_path / "x", seeds=range(2))
    assert not left.exists()


def test_a_full_disk_names_the_file_and_leaves_no_part_of_it(run, tmp_path, monkeypatch):
    store = sample_to(run, tmp_path / "x", seeds=range(2))

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match=r"could not write .*000000/000002\.png \(No space left on device\)"):
        sample_to(run, tmp_path / "x", seeds=range(4))
    assert sorted(file.name for file in store.path(0).parent.iterdir()) == ["000000.png", "000001.png"]


@pytest.mark.parametrize("name", ["x.zip", "x.png", "x.npy", "x.PT", "x.jpeg"])
def test_names_of_other_formats_are_refused(run, tmp_path, name):
    with pytest.raises(ConfigError, match=r"images are written to a folder of PNG files, or to a file\.npz"):
        sample_to(run, tmp_path / name, seeds=range(2))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["steps-0.4", "steps-0.6", "v1.0.2", "a.b"])
def test_a_dot_in_a_name_is_no_suffix(tmp_path, name):
    images, floats = (SampleStore.at(tmp_path / name, images) for images in (True, False))
    assert (images.out, images.sheet) == (tmp_path / name, tmp_path / f"{name}.png")
    assert (floats.out, floats.folder) == (tmp_path / f"{name}.npz", tmp_path / f"{name}.parts")
    assert SampleStore.at(tmp_path / "X.NPZ", True).out == tmp_path / "X.NPZ"
    assert not SampleStore.at(tmp_path / "X.NPZ", True).png


def test_a_folder_that_cannot_be_written_is_named(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"could not create .*file/x \(.*\); choose another --out"):
        sample_to(run, tmp_path / "file" / "x", seeds=range(2))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (5, 3), (8, 64)])
def test_png_files_hold_the_bytes_of_the_images(channels, size, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, channels), dtype=np.uint8)
    content = encode_png(pixels, {"label": "7", "note": "\xe9"})
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        assert image.info["label"] == "7"
        assert np.array_equal(np.asarray(image).reshape(pixels.shape), pixels)
    with Image.open(io.BytesIO(content)) as image:
        image.verify()
    with pytest.raises(ValueError, match="one or three channels"):
        encode_png(np.zeros((4, 4, 2), np.uint8))


def test_a_sheet_shows_every_image_in_order(tmp_path):
    x = torch.rand(5, 3, 30, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1
    save_sheet(tmp_path / "sheet.png", x, columns=2)
    found, shown = np.asarray(Image.open(tmp_path / "sheet.png")), to_pixels(x).repeat(2, 1).repeat(2, 2)
    assert found.shape == (3 * 62, 2 * 42, 3)
    for number in range(5):
        row, column = divmod(number, 2)
        assert np.array_equal(found[row * 62 + 1 : row * 62 + 61, column * 42 + 1 : column * 42 + 41], shown[number])
