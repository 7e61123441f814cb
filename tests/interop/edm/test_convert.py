"""Published checkpoints of EDM become runs that sample the published images, and can be converted back."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from edm_files import snapshot
from safetensors.torch import load_file
from typer.testing import CliRunner

from stablefield.checkpoint import read
from stablefield.cli import app
from stablefield.data.pickles import RefusedError
from stablefield.interop.convert import from_edm
from stablefield.interop.edm import EDMCheckpoint
from stablefield.run import load

pytestmark = pytest.mark.usefixtures("unchecked")

DATA = Path(__file__).parents[2] / "data" / "edm"
CONFIGURATIONS = sorted(path.name for path in DATA.iterdir())


def command(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def converted(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("edm")
    (folder / "network-snapshot-000000.pkl").write_bytes(snapshot(request.param))
    result = command("convert", folder / "network-snapshot-000000.pkl", folder / "run")
    assert result.exit_code == 0, result.output
    return folder / "run", np.load(DATA / request.param / "io.npz"), request.param


def relative_error(found, expected) -> float:
    """Largest difference of an image relative to its largest value, over all images."""
    found, expected = (np.asarray(a, np.float64).reshape(len(expected), -1) for a in (found, expected))
    return float((abs(found - expected).max(1) / abs(expected).max(1)).max())


def test_the_denoiser_equals_the_published_one(converted):
    run, io, _ = converted
    x, sigma = torch.from_numpy(io["x"]), torch.from_numpy(io["sigma"]).float().flatten()
    label = torch.from_numpy(io["class_labels"]).argmax(1) if "class_labels" in io else None
    augment = torch.from_numpy(io["augment_labels"]) if "augment_labels" in io else None
    assert relative_error(load(run)(x, sigma.expand(len(x)), label, augment), io["denoised"]) < 1e-5


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("heun8", []),
        ("churn8", ["churn=2", "churn_min=0.05", "churn_max=50", "churn_noise=1.003"]),
        ("churn8_capped", ["churn=40", "churn_min=0.05", "churn_max=50", "churn_noise=1.003"]),
    ],
)
def test_the_command_samples_the_published_images(converted, tmp_path, name, settings):
    run, io, _ = converted
    seeds = ",".join(map(str, io["seeds"]))
    flags = [part for setting in settings for part in ("--set", f"sampler.{setting}")]
    arguments = ["sample", run, "--seeds", seeds, "--sampler", "heun", "--steps", 8, *flags]
    result = command(*arguments, "--out", tmp_path / "x.npz")
    assert result.exit_code == 0, result.output
    found = np.load(tmp_path / "x.npz")["arr_0"].astype(int)
    expected = io["heun8_uint8"] if name == "heun8" else np.clip(io[name] * 127.5 + 128, 0, 255).astype(np.uint8)
    expected = expected.transpose(0, 2, 3, 1).astype(int)
    assert abs(found - expected).max() <= 1
    assert (found != expected).mean() < 1e-3


def test_converting_back_gives_edms_names_and_the_same_bits(converted, tmp_path):
    run, _, configuration = converted
    assert command("convert", run, tmp_path / "edm.safetensors", "--to", "edm").exit_code == 0
    found, expected = load_file(tmp_path / "edm.safetensors"), load_file(DATA / configuration / "state.safetensors")
    expected = {name if name.startswith("model.") else f"model.{name}": value for name, value in expected.items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_published_weights_are_trained_further_on_data_that_are_set(converted, tmp_path):
    run, _, configuration = converted
    refused = command("train", "--init-from", run, "--out", tmp_path / "none")
    assert "does not say which data" in str(refused.exception)
    assert not (tmp_path / "none").exists()
    rng = np.random.default_rng(0)
    labels = {"labels": np.arange(32) % 4} if "cond" in configuration else {}
    np.savez(tmp_path / "data.npz", data=rng.integers(0, 256, (32, 3, 16, 16), dtype=np.uint8), **labels)
    settings = ["data.kind=arrays", f"data.path={tmp_path / 'data.npz'}", "target.size=16", "training.images=16"]
    settings += ["training.batch_size=8", f"training.conditional={'true' if labels else 'false'}"]
    flags = [part for setting in settings for part in ("--set", setting)]
    result = command("train", "--init-from", run, "--out", tmp_path / "tuned", *flags)
    assert result.exit_code == 0, result.output
    before, after = read(run / "checkpoint.safetensors"), read(tmp_path / "tuned" / "checkpoint.safetensors")
    weights = [name for name in before.tensors if name.endswith("conv0.weight")]
    moved = [(after.tensors[name] - before.tensors[name]).abs().max() for name in weights]
    assert 0 < max(moved) < 0.1


def test_weights_for_other_data_are_refused(converted, tmp_path):
    run, _, _ = converted
    refused = command("train", "--init-from", run, "--out", tmp_path / "none", "--set", "data.kind=digits")
    assert refused.exit_code == 1
    assert "they are for data of shape" in str(refused.exception) or "target" in str(refused.exception)


def test_unknown_arguments_and_tensors_are_refused_by_name():
    arguments = {"model_type": "SongUNet", "img_resolution": 16, "img_channels": 3, "label_dim": 0}
    with pytest.raises(RefusedError, match="mystery"):
        from_edm(EDMCheckpoint("network-snapshot", "EDMPrecond", arguments | {"mystery": 1}, {}))
    with pytest.raises(RefusedError, match="OtherUNet"):
        from_edm(EDMCheckpoint("network-snapshot", "EDMPrecond", arguments | {"model_type": "OtherUNet"}, {}))
    with pytest.raises(RefusedError, match="outside of its model"):
        from_edm(EDMCheckpoint("network-snapshot", "EDMPrecond", arguments, {"extra": torch.ones(1)}))


def test_a_network_that_edm_does_not_have_is_refused(tmp_path):
    settings = ["training.images=128", "target.size=8", "network.channels=8", "network.blocks=1"]
    flags = [part for setting in settings for part in ("--set", setting)]
    assert command("train", "--out", tmp_path / "run", *flags).exit_code == 0
    refused = command("convert", tmp_path / "run", tmp_path / "x.safetensors", "--to", "edm")
    assert "EDM has no network 'unet'" in str(refused.exception)


@pytest.mark.skipif(
    "STABLEFIELD_FIXTURES" not in os.environ, reason="requires the published files in STABLEFIELD_FIXTURES"
)
def test_published_files_of_adm_and_training_states_are_converted(tmp_path):
    folder = Path(os.environ["STABLEFIELD_FIXTURES"]) / "edm"
    for place in sorted(folder.glob("*/network-snapshot-*.pkl")) + sorted(folder.glob("*/training-state-*.pt")):
        out = tmp_path / f"{place.parent.name}-{place.suffix[1:]}"
        assert command("convert", place, out).exit_code == 0
        io, arguments = np.load(place.parent / "io.npz"), json.loads((place.parent / "config.json").read_text())
        label = torch.from_numpy(io["class_labels"]).argmax(1) if "class_labels" in io else None
        augment = torch.from_numpy(io["augment_labels"]) if "augment_labels" in io else None
        x, sigma = torch.from_numpy(io["x"]), torch.from_numpy(io["sigma"]).float().flatten()
        assert relative_error(load(out)(x, sigma.expand(len(x)), label, augment), io["denoised"]) < 1e-5, arguments
