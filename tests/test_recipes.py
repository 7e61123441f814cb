"""Recipes say what was published, can be made at full size, and train."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from stablefield.cli import app
from stablefield.config import ConfigError, overlay, read_toml, resolve
from stablefield.recipes import read_recipe, recipe_text, recipes
from stablefield.run import Folder, make_denoiser, make_sampler, open_run

pytestmark = pytest.mark.usefixtures("unchecked")
every_recipe = pytest.mark.parametrize("name", recipes())

# what the papers say: their tables beside ours, in millions of images where they count so
EDM = {
    "times": {"kind": "lognormal", "mean": -1.2, "std": 1.2},
    "weight": {"kind": "edm", "sigma_data": 0.5},
    "scaling": {"kind": "edm", "sigma_data": 0.5},
    "grid": {"kind": "edm", "sigma_min": 0.002, "sigma_max": 80, "rho": 7},
}
VE = {"process": {"kind": "ve"}, "weight": {"kind": "noise"}, "sampler": {"kind": "predictor-corrector", "snr": 0.16}}
VP = {
    "process": {"kind": "vp", "beta_min": 0.1, "beta_d": 19.9},
    "times": {"kind": "uniform", "low": 1e-5, "high": 1},
    "weight": {"kind": "noise"},
    "scaling": {"kind": "vp", "beta_min": 0.1, "beta_d": 19.9},
    "sampler": {"kind": "euler-maruyama", "steps": 1000},
}
SONG = {"batch_size": 128, "learning_rate": 2e-4, "ramp": 5000 * 128, "clip": 1, "images": 1_300_000 * 128}
#       name                     parts  batch lr   ramp duration half-life dropout multipliers  augmentation evaluations
TABLE = {
    "cifar10-ncsnpp-edm-stf": (EDM, 512, 1e-3, 10, 200, 0.5, 0.13, [2, 2, 2], 0.12, 35),
    "cifar10-ddpmpp-edm-stf": (EDM, 512, 1e-3, 10, 200, 0.5, 0.13, [2, 2, 2], 0.12, 35),
    "ffhq64": (EDM, 256, 2e-4, 10, 200, 0.5, 0.05, [1, 2, 2, 2], 0.15, 79),
    "afhqv2-64": (EDM, 256, 2e-4, 10, 200, 0.5, 0.25, [1, 2, 2, 2], 0.15, 79),
    "imagenet64-adm": (EDM, 4096, 1e-4, 10, 2500, 50, 0.1, [1, 2, 3, 4], "none", 511),
    "cifar10-ncsnpp-ve": (VE, 128, 2e-4, 0.64, 166.4, 0.0887, 0.1, [1, 2, 2, 2], "mirror", 2000),
    "cifar10-ddpmpp-vp": (VP, 128, 2e-4, 0.64, 166.4, 0.8872, 0.1, [1, 2, 2, 2], "mirror", 1000),
    "celeba64-ncsnpp-ve": (VE, 128, 2e-4, 0.64, 166.4, 0.0887, 0.1, [1, 2, 2, 2], "mirror", 2000),
}
COUNTED = {  # published sizes, in millions of parameters, at the shape of the data and its classes
    "cifar10-ncsnpp-edm-stf": ((3, 32, 32), 0, 56.4),
    "cifar10-ddpmpp-edm-stf": ((3, 32, 32), 0, 55.7),
    "ffhq64": ((3, 64, 64), 0, 61.8),
    "afhqv2-64": ((3, 64, 64), 0, 61.8),
    "imagenet64-adm": ((3, 64, 64), 1000, 295.9),
    "cifar10-ncsnpp-ve": ((3, 32, 32), 0, 62.8),
    "cifar10-ddpmpp-vp": ((3, 32, 32), 0, 61.8),
    "celeba64-ncsnpp-ve": ((3, 64, 64), 0, 62.8),
}
SLIM = ["model_channels=8", "num_blocks=1"]
NARROW = {"ncsnpp": SLIM, "ddpmpp": SLIM, "adm": [*SLIM, "channels_per_head=8"], "unet": ["channels=8"]}


def command(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def said(name: str, **data: str):
    return resolve(overlay(read_recipe(name), {"data": {"kind": "arrays", "path": "x.npz", **data}}))


def images(folder: Path, shape: tuple[int, ...], classes: int) -> Path:
    draw = np.random.default_rng(0)
    path = folder / "images.npz"
    labels = np.arange(24) % max(classes, 1)
    np.savez(path, data=draw.integers(256, size=(24, *shape), dtype=np.uint8), labels=labels)
    return path


@pytest.mark.parametrize("name", TABLE)
def test_a_published_recipe_says_what_its_paper_says(name):
    parts, batch, rate, ramp, duration, half_life, dropout, multipliers, augmentation, evaluations = TABLE[name]
    config = said(name)
    for section, values in parts.items():
        assert values.items() <= config[section].items()
    training = config.training
    assert (training.batch_size, training.learning_rate) == (batch, rate)
    assert (training.ramp / 1e6, training.images / 1e6) == (ramp, duration)
    assert training.ema_half_life / 1e6 == pytest.approx(half_life, rel=1e-3)
    network, sampler = config["network"], make_sampler(config)
    assert (network["dropout"], network["channel_mult"]) == (dropout, multipliers)
    assert config["augmentation"].get("p", config["augmentation"]["kind"]) == augmentation
    assert network["augment_dim"] == (9 if config["augmentation"]["kind"] == "edm" else 0)
    assert config["target"]["kind"] == "reference"
    cost = {"heun": 2 * sampler.steps - 1, "predictor-corrector": 2 * sampler.steps, "euler-maruyama": sampler.steps}
    assert cost[config["sampler"]["kind"]] == evaluations


@pytest.mark.parametrize("name", [name for name in TABLE if TABLE[name][0] is not EDM])
def test_steps_of_song_et_al_are_converted_to_images(name):
    training = said(name).training
    assert {key: getattr(training, key) for key in SONG} == SONG
    decay = 2 ** (-training.batch_size / training.ema_half_life)
    assert decay == pytest.approx(0.9999 if name.endswith("vp") else 0.999, abs=1e-8)
    # their average starts as (1 + step) / (10 + step)
    step = 2000
    early = 2 ** (-1 / (training.ema_ramp_up * step))
    assert early == pytest.approx((1 + step) / (10 + step), abs=2e-5)


@pytest.mark.parametrize("name", COUNTED)
def test_a_published_recipe_makes_a_network_of_the_published_size(name):
    shape, classes, millions = COUNTED[name]
    config = said(name)
    with torch.device("meta"):
        network = config.make("network", shape=shape, label_dim=classes)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == millions


@every_recipe
def test_every_recipe_trains_when_made_narrow(name, tmp_path):
    shape, classes, _ = COUNTED.get(name, ((1, 28, 28), 10, 0))
    classes = min(classes, 3)
    narrow = NARROW[said(name)["network"]["kind"]]
    settings = [f"network.{key}" for key in narrow] + ["target.size=8", "training.images=4", "training.batch_size=2"]
    settings += ["training.sample_every=0", "training.save_every=4", "training.ramp=0", "training.precision=float32"]
    flags = [part for setting in settings for part in ("--set", setting)]
    out, data = tmp_path / "run", images(tmp_path, shape, classes)
    result = command("train", "--recipe", name, "--data", data, "--out", out, *flags)
    assert result.exit_code == 0, (result.output, result.exception)
    line = Folder(out).history()[-1]
    assert line["Progress/kimg"] == 0.004
    assert 0 < line["Loss/loss"] < float("inf")
    changed, fresh = open_run(out, weights="model").denoiser, open_run(out).config
    begun = make_denoiser(fresh, shape, classes)
    pairs = zip(changed.parameters(), begun.parameters(), strict=True)
    assert any(not torch.equal(one, other) for one, other in pairs)


@every_recipe
def test_a_recipe_names_no_file_and_says_where_it_is_from(name):
    text = recipe_text(name)
    assert text.startswith("# ")
    assert len(recipes()[name]) <= 90
    assert "path" not in read_recipe(name)["data"]
    assert re.search(r"Karras|Song|^# Ours", text, re.MULTILINE)


def test_the_recipe_of_the_digits_is_what_train_does_without_options():
    assert resolve(read_recipe("digits")) == resolve({})


def test_recipes_are_listed_and_shown():
    listed = command("recipes").output
    assert all(name in listed and title in listed for name, title in recipes().items())
    assert command("recipes", "ffhq64").output.strip() == recipe_text("ffhq64").strip()


def test_a_file_speaks_over_the_recipe_and_a_setting_over_both(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[target]\nsize = 128\n[training]\nbatch_size = 32\n")
    flags = ["--recipe", "digits", "--config", file, "--set", "training.batch_size=16"]
    result = command("train", "--dry-run", *flags)
    written = re.search(r"^\[data\].*(?=\nThis was)", result.output, re.MULTILINE | re.DOTALL)
    (tmp_path / "resolved.toml").write_text(written[0])
    config = resolve(read_toml(tmp_path / "resolved.toml"))
    assert (config["target"]["size"], config.training.batch_size, config.training.images) == (128, 16, 96_000)
    assert "runs/digits-reference" in result.output


def test_data_at_a_path_are_taken_as_what_they_are(tmp_path):
    data = images(tmp_path, (1, 8, 8), 0)
    result = command("train", "--dry-run", "--data", data, "--set", "target.size=8")
    assert 'kind = "arrays"' in result.output
    assert "Pool((24, 1, 8, 8) uint8" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "cifar"], "there is no recipe 'cifar'; there are afhqv2-64, celeba64"),
        (["--recipe", "ffhq64"], "data.path: has no default, and must be said, at the terminal as --data PATH"),
        (["--data", "nowhere.zip"], "there is no file or folder nowhere.zip"),
        (["--resume", "runs/x", "--recipe", "digits"], "it goes with none of --recipe"),
    ],
)
def test_a_mistake_is_answered_with_the_way_out(arguments, message):
    result = command("train", *arguments)
    assert message in str(result.exception)
    assert isinstance(result.exception, ConfigError | ValueError)
