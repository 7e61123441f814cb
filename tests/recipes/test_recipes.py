"""Recipes contain the published hyper-parameters, build networks of the published size, and train."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from stablefield.build import build_denoiser, build_sampler
from stablefield.cli import app
from stablefield.config import ConfigError, overlay, override, read_toml, resolve
from stablefield.recipes import list_recipes, read_recipe, recipe_text
from stablefield.run import RunFolder, open_run

pytestmark = pytest.mark.usefixtures("unchecked")
every_recipe = pytest.mark.parametrize("name", list_recipes())

# the values in the papers, in millions of images where the papers count so
EDM = {
    "times": {"kind": "lognormal", "mean": -1.2, "std": 1.2},
    "weight": {"kind": "edm", "sigma_data": 0.5},
    "preconditioning": {"kind": "edm", "sigma_data": 0.5},
    "grid": {"kind": "edm", "sigma_min": 0.002, "sigma_max": 80, "rho": 7},
}
VE = {
    "process": {"kind": "ve"},
    "weight": {"kind": "snr"},
    "preconditioning": {"kind": "ve"},
    "sampler": {"kind": "predictor-corrector", "corrections": 1},
}
VP = {
    "process": {"kind": "vp", "beta_min": 0.1, "beta_d": 19.9},
    "times": {"kind": "uniform", "low": 1e-5, "high": 1},
    "weight": {"kind": "snr"},
    "preconditioning": {"kind": "vp", "beta_min": 0.1, "beta_d": 19.9},
    "sampler": {"kind": "euler-maruyama", "steps": 1000},
}
SONG = {
    "batch_size": 128,
    "learning_rate": 2e-4,
    "learning_rate_warmup": 5000 * 128,
    "images": 1_300_000 * 128,
}
# name: sections, batch, learning rate, warmup, duration, half-life, dropout, multipliers, augmentation, evaluations
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
SIZES = {  # shape of the data, number of classes, published size of the network in millions of parameters
    "cifar10-ncsnpp-edm-stf": ((3, 32, 32), 0, 56.4),
    "cifar10-ddpmpp-edm-stf": ((3, 32, 32), 0, 55.7),
    "ffhq64": ((3, 64, 64), 0, 61.8),
    "afhqv2-64": ((3, 64, 64), 0, 61.8),
    "imagenet64-adm": ((3, 64, 64), 1000, 295.9),
    "cifar10-ncsnpp-ve": ((3, 32, 32), 0, 62.8),
    "cifar10-ddpmpp-vp": ((3, 32, 32), 0, 61.8),
    "celeba64-ncsnpp-ve": ((3, 64, 64), 0, 62.8),
}
SMALL = ["model_channels=8", "num_blocks=1"]
SMALLER = {"ncsnpp": SMALL, "ddpmpp": SMALL, "adm": [*SMALL, "channels_per_head=8"], "unet": ["channels=8"]}


def command(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def resolved(name: str, **data: str):
    return resolve(overlay(read_recipe(name), {"data": {"kind": "arrays", "path": "x.npz", **data}}))


def images(folder: Path, shape: tuple[int, ...], classes: int) -> Path:
    draw = np.random.default_rng(0)
    path = folder / "images.npz"
    labels = np.arange(24) % max(classes, 1)
    np.savez(path, data=draw.integers(256, size=(24, *shape), dtype=np.uint8), labels=labels)
    return path


@pytest.mark.parametrize("name", TABLE)
def test_a_recipe_has_the_hyper_parameters_of_its_paper(name):
    sections, batch, rate, warmup, duration, half_life, dropout, multipliers, augmentation, evaluations = TABLE[name]
    config = resolved(name)
    for section, values in sections.items():
        assert values.items() <= config.sections[section].items()
    training = config.training
    assert (training.batch_size, training.learning_rate) == (batch, rate)
    assert (training.learning_rate_warmup / 1e6, training.images / 1e6) == (warmup, duration)
    assert training.ema_half_life / 1e6 == pytest.approx(half_life, rel=1e-3)
    network, sampler = config.sections["network"], build_sampler(config)
    assert (network["dropout"], network["channel_mult"]) == (dropout, multipliers)
    assert config.sections["augmentation"].get("p", config.kind("augmentation")) == augmentation
    assert network["augment_dim"] == (9 if config.kind("augmentation") == "edm" else 0)
    assert config.kind("target") == "stf"
    network_evaluations = {
        "heun": 2 * sampler.steps - 1,
        "predictor-corrector": 2 * sampler.steps,
        "euler-maruyama": sampler.steps,
    }
    assert network_evaluations[config.kind("sampler")] == evaluations


@pytest.mark.parametrize("name", [name for name in TABLE if TABLE[name][0] is not EDM])
def test_hyper_parameters_in_steps_are_converted_to_images(name):
    training = resolved(name).training
    assert {key: getattr(training, key) for key in SONG} == SONG
    decay = 2 ** (-training.batch_size / training.ema_half_life)
    assert decay == pytest.approx(0.9999 if name.endswith("vp") else 0.999, abs=1e-8)
    # the decay of their average starts as (1 + step) / (10 + step)
    step = 2000
    early = 2 ** (-1 / (training.ema_rampup_ratio * step))
    assert early == pytest.approx((1 + step) / (10 + step), abs=2e-5)


@pytest.mark.parametrize("name", TABLE)
def test_the_scales_of_the_papers_losses_are_carried_over_to_a_mean_over_dimensions(name):
    # scale of our loss relative to the published one: EDM's is a sum, score_sde's half a sum for VE and a mean for VP
    training, dims = resolved(name).training, math.prod(SIZES[name][0])
    scale = {"edm": 1 / dims, "ve": 2 / dims, "vp": 1}[resolved(name).kind("preconditioning")]
    loss_scale = 100 if name.startswith("imagenet") else 1
    assert training.adam_eps == pytest.approx(1e-8 * scale / loss_scale, rel=2e-3)
    clip = None if TABLE[name][0] is EDM else pytest.approx(scale, rel=2e-3)
    assert training.gradient_clip == clip


def test_a_recipe_samples_with_the_snr_of_its_paper():
    assert resolved("cifar10-ncsnpp-ve").sections["sampler"]["snr"] == 0.16
    assert resolved("celeba64-ncsnpp-ve").sections["sampler"]["snr"] == 0.17


@pytest.mark.parametrize("name", [name for name in TABLE if TABLE[name][8] not in ("none", "mirror")])
def test_recipes_with_augmentation_see_references_through_it_and_offer_the_published_estimator(name):
    assert resolved(name).sections["target"]["augmented_size"] > 1
    published = resolve(
        override(overlay(read_recipe(name), {"data": {"path": "x.npz"}}), ["target.kind=stf-published"])
    )
    assert published.sections["target"] == {"kind": "stf-published", "size": 1024}


@pytest.mark.parametrize("name", SIZES)
def test_a_recipe_builds_a_network_of_the_published_size(name):
    shape, classes, millions = SIZES[name]
    config = resolved(name)
    with torch.device("meta"):
        network = config.make("network", shape=shape, num_classes=classes)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == millions


@every_recipe
def test_every_recipe_trains_with_a_smaller_network(name, tmp_path):
    shape, classes, _ = SIZES.get(name, ((1, 28, 28), 10, 0))
    classes = min(classes, 3)
    config = resolved(name)
    settings = [f"network.{key}" for key in SMALLER[config.kind("network")]]
    settings += ["target.size=8"] if config.kind("target") == "stf" else []
    settings += ["training.images=4", "training.batch_size=2"]
    settings += [
        "training.sample_every=0",
        "training.save_every=4",
        "training.learning_rate_warmup=0",
        "training.precision=float32",
    ]
    flags = [part for setting in settings for part in ("--set", setting)]
    out, data = tmp_path / "run", images(tmp_path, shape, classes)
    result = command("train", "--recipe", name, "--data", data, "--out", out, *flags)
    assert result.exit_code == 0, (result.output, result.exception)
    line = RunFolder(out).history()[-1]
    assert line["progress/kimg"] == 0.004
    assert 0 < line["loss/loss"] < float("inf")
    trained, config = open_run(out, weights="model").denoiser, open_run(out).config
    initial = build_denoiser(config, shape, classes)
    pairs = zip(trained.parameters(), initial.parameters(), strict=True)
    assert any(not torch.equal(one, other) for one, other in pairs)


@every_recipe
def test_a_recipe_has_a_short_title_sources_and_no_path(name):
    text = recipe_text(name)
    assert text.startswith("# ")
    assert len(list_recipes()[name]) <= 90
    assert "path" not in read_recipe(name)["data"]
    assert re.search(r"Karras|Song|^# Ours", text, re.MULTILINE)


def test_the_digits_recipe_is_the_default_configuration():
    assert resolve(read_recipe("digits")) == resolve({})


def test_the_recipes_command_lists_recipes_and_shows_one():
    listed = command("recipes").output
    assert all(name in listed and title in listed for name, title in list_recipes().items())
    assert command("recipes", "ffhq64").output.strip() == recipe_text("ffhq64").strip()


def test_a_config_file_overrides_the_recipe_and_set_overrides_both(tmp_path):
    file = tmp_path / "config.toml"
    file.write_text("[target]\nsize = 128\n[training]\nbatch_size = 32\n")
    flags = ["--recipe", "digits", "--config", file, "--set", "training.batch_size=16"]
    result = command("train", "--dry-run", *flags)
    written = re.search(r"^\[data\].*(?=\nThis was)", result.output, re.MULTILINE | re.DOTALL)
    (tmp_path / "resolved.toml").write_text(written[0])
    config = resolve(read_toml(tmp_path / "resolved.toml"))
    assert (config.sections["target"]["size"], config.training.batch_size, config.training.images) == (128, 16, 96_000)
    assert "runs/digits-stf" in result.output


def test_the_kind_of_data_at_a_path_is_detected(tmp_path):
    data = images(tmp_path, (1, 8, 8), 0)
    result = command("train", "--dry-run", "--data", data, "--set", "target.size=8")
    assert 'kind = "arrays"' in result.output
    assert "Pool((24, 1, 8, 8) uint8" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "cifar"], "there is no recipe 'cifar'; choose one of afhqv2-64, celeba64"),
        (["--recipe", "ffhq64"], "data.path: has no default and must be set, with --data PATH at the terminal"),
        (["--data", "nowhere.zip"], "there is no file or folder nowhere.zip"),
        (["--resume", "runs/x", "--recipe", "digits"], "--resume cannot be combined with --recipe"),
    ],
)
def test_errors_name_the_way_out(arguments, message):
    result = command("train", *arguments)
    assert message in str(result.exception)
    assert isinstance(result.exception, ConfigError | ValueError)
