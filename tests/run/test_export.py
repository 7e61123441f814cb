"""Exports: they hold one set of weights, open as runs do, name no folder, and their model card shows text as text."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from markdown_it import MarkdownIt
from short_runs import trained
from typer.testing import CliRunner

import stablefield
from stablefield import checkpoint
from stablefield.checkpoint import CheckpointError
from stablefield.cli import app
from stablefield.config import ConfigError
from stablefield.run import export_run, open_run

FILES = {"model.safetensors", "config.json", "README.md"}
X_T, T = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.01, 0.3, 1.0, 80.0])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    trained(folder, "training.ema_half_life=[64, 1000]", "training.images=64", "data.holdout=100")
    return folder


@pytest.fixture
def exported(run, tmp_path) -> Path:
    return export_run(run, tmp_path / "exported")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def same(one: stablefield.Denoiser, other: stablefield.Denoiser) -> bool:
    return torch.equal(one(X_T, T), other(X_T, T))


def rewritten(run: Path, out: Path, **changes: object) -> Path:
    """A copy of a run whose checkpoint has another description, with a checksum that matches."""
    shutil.copytree(run, out)
    found = checkpoint.read(run / "checkpoint.safetensors")
    checkpoint.save(out / "checkpoint.safetensors", found.tensors, config=found.config | changes, images=found.images)
    return out


def test_an_export_holds_one_set_of_weights_and_denoises_as_its_run(run, exported):
    assert names(exported) == FILES
    before = set(checkpoint.read(run / "checkpoint.safetensors").tensors)
    after = set(checkpoint.read(exported / "model.safetensors").tensors)
    assert after == {name for name in before if name.startswith("average.")} < before
    assert same(stablefield.load(exported), stablefield.load(run))
    assert not same(stablefield.load(exported), stablefield.load(run, weights="model"))
    one, other = open_run(exported), open_run(run)
    assert (one.shape, one.values, one.images, one.data) == (other.shape, other.values, other.images, other.data)
    assert one.config == other.config


def test_the_weights_of_an_export_keep_their_name_and_are_its_default(run, tmp_path):
    written = checkpoint.read(run / "checkpoint.safetensors").tensors
    choices = {name.partition(".")[0] for name in written if name.startswith(("average", "model"))}
    assert len(choices) == 3
    for name in choices:
        out = export_run(run, tmp_path / name, weights=name)
        assert open_run(out).weights == name
        assert same(stablefield.load(out), stablefield.load(run, weights=name))
        assert f"* weights: {name}\n" in (out / "README.md").read_text()
        for other in choices - {name}:
            with pytest.raises(ValueError, match=f"no weights '{other}'"):
                stablefield.load(out, weights=other)
    best = export_run(run, tmp_path / "best", weights="best")
    assert same(stablefield.load(best), stablefield.load(run, weights="best"))


def test_an_export_replaces_an_earlier_export_and_nothing_else(run, exported):
    first = (exported / "model.safetensors").read_bytes()
    export_run(run, exported, weights="model", license="mit")
    assert names(exported) == FILES
    assert names(exported.parent) == {"exported"}
    assert (exported / "model.safetensors").read_bytes() != first
    assert "\nlicense: mit\n" in (exported / "README.md").read_text()

    (exported / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds more than an earlier export: notes.txt"):
        export_run(run, exported)
    assert names(exported) == {*FILES, "notes.txt"}


@pytest.mark.parametrize("name", ["README.md", "model.safetensors", "other"])
def test_a_folder_that_is_not_an_export_is_refused(name, run, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=f"holds more than an earlier export: {name}"):
        export_run(run, tmp_path)
    assert names(tmp_path) == {name}
    with pytest.raises(ConfigError, match=r"holds more than an earlier export: .*config\.toml"):
        export_run(run, run)
    with pytest.raises(ConfigError, match="is a file"):
        export_run(run, tmp_path / name)


def test_an_export_that_fails_leaves_what_was_there(run, exported, monkeypatch):
    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if Path(target) == exported and self.parent == exported.parent:  # the new folder, not the one that is put back
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match=r"could not write .*No space left on device.*untouched"):
        export_run(run, exported, weights="model")
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before
    assert names(exported.parent) == {"exported"}
    monkeypatch.setattr(Path, "write_text", lambda *_, **options: fails(exported, exported))
    with pytest.raises(OSError, match="No space left"):
        export_run(run, exported.parent / "another")
    assert names(exported.parent) == {"exported"}


@pytest.mark.parametrize("license", ["", "a b", "mit\ntags: x", "x" * 65, "-mit", "mit:"])
def test_a_license_is_an_identifier(license, run, tmp_path):
    with pytest.raises(ConfigError, match="--license takes an identifier"):
        export_run(run, tmp_path / "out", license=license)
    assert not names(tmp_path)


def test_the_folders_of_data_are_left_out(run, tmp_path):
    found = checkpoint.read(run / "checkpoint.safetensors").config
    for path, kept in (("/home/alice/secret/faces.npz", "faces.npz"), ("secret/faces.npz", "faces.npz")):
        data = {"kind": "arrays", "path": path}
        other = rewritten(run, tmp_path / kept / str(len(path)), config=found["config"] | {"data": data})
        out = export_run(other, tmp_path / "out")
        assert open_run(out).config.data_path == kept
        assert all(b"secret" not in file.read_bytes() for file in out.iterdir())
    hub_data = found["config"] | {"data": {"kind": "huggingface", "path": "alice/faces"}}
    out = export_run(rewritten(run, tmp_path / "hub", config=hub_data), tmp_path / "out")
    assert open_run(out).config.data_path == "alice/faces"


def test_a_config_that_was_changed_is_refused(exported):
    file = exported / "config.json"
    written = json.loads(file.read_text())
    for text in (json.dumps(written | {"images": 7}), "{", "[" * 100_000, "null"):
        file.write_text(text)
        with pytest.raises(CheckpointError, match=r"config.json is not the configuration that model.safetensors"):
            stablefield.load(exported)
    file.write_text(json.dumps(written))  # spaces do not matter
    stablefield.load(exported)
    file.unlink()
    stablefield.load(exported)
    stablefield.load(exported / "model.safetensors")


def test_classes_of_the_user_are_imported_only_if_they_are_allowed(run, tmp_path, monkeypatch):
    (tmp_path / "hostile.py").write_text("raise SystemExit('was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    sections = checkpoint.read(run / "checkpoint.safetensors").config["config"]
    named = rewritten(run, tmp_path / "run", config=sections | {"network": {"kind": "hostile:Net"}})
    with pytest.raises(ConfigError, match="--allow hostile:Net"):
        export_run(named, tmp_path / "out")
    shutil.copy(named / "checkpoint.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="--allow hostile:Net"):
        stablefield.load(tmp_path)


# --- the model card ---------------------------------------------------------------------------------------------------

HOSTILE = "<script>x</script> [a](http://b.c) ![i](j) `c` **d** |e|\n\n# heading\n\n* item\n\x1b[31m www.f.g &lt; ```"


def record(run: Path, **changes: object) -> dict:
    samples = {"checkpoint": open_run(run).checksum, "n": 50000, "repeats": 3, "sampler": "Heun()"}
    scores = {"fid": {"mean": 2.5, "std": 0.01, "values": [2.5]}}
    notes = ["few samples"]
    reference = {"name": "Digits()", "n": 1697, "hash": "abc"}
    features = {"name": "inception", "dimension": 2048}
    whole = {"samples": samples, "scores": scores, "notes": notes, "reference": reference, "features": features}
    return whole | {"date": "2026-01-02T03:04"} | changes


def card_with(run: Path, folder: Path, *lines: object) -> str:
    shutil.copytree(run, folder / "run")
    (folder / "run" / "scores.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return (export_run(folder / "run", folder / "out") / "README.md").read_text()


def test_the_card_shows_data_settings_and_the_scores_of_these_weights(run, tmp_path):
    other = record(run, samples={"checkpoint": "of other weights", "n": 7}, notes=["of another checkpoint"])
    card = card_with(run, tmp_path, other, record(run), record(run, date="2026-02-03T04:05"))
    opened = open_run(run)
    assert f"* hash (SHA-256): {opened.data}" in card
    assert f"* checkpoint: {opened.checksum}" in card
    assert "| fid | 2.5 | 0.01 |" in card
    assert "n = 50,000, repeats: 3" in card
    assert "* reference: training data, n = 1,697, hash abc" in card
    assert "Note: few samples" in card
    assert "another checkpoint" not in card
    assert "2026-01-02" not in card  # the same scores again replace the earlier ones
    assert "* date: 2026-02-03" in card
    assert "No license was given" in card
    settings = "".join(line[4:] + "\n" for line in card.partition("## Settings\n\n")[2].splitlines())
    assert settings == opened.config.toml()


def test_a_run_without_scores_says_so(exported):
    assert "No scores of these weights were recorded." in (exported / "README.md").read_text()


def test_text_of_files_is_shown_as_text(run, tmp_path):
    clean = card_with(run, tmp_path / "clean", record(run))
    hostile = record(
        run,
        scores={HOSTILE: {"mean": 1.0, "std": HOSTILE}, "fid": HOSTILE, "kid": {"mean": [1]}},
        notes=[HOSTILE],
        reference={"name": HOSTILE, "n": HOSTILE, "hash": [HOSTILE]},
        features={"name": HOSTILE, "dimension": HOSTILE},
        date=HOSTILE,
    )
    hostile["samples"] |= {"sampler": HOSTILE, "seeds": [HOSTILE], "class": HOSTILE, "evaluations": {HOSTILE: 1}}
    card = card_with(run, tmp_path / "hostile", hostile, [], 3, {"samples": 3}, record(run, scores=[], notes=HOSTILE))
    assert "\x1b" not in card
    markdown = MarkdownIt("commonmark", {"html": True}).enable("table")

    def structure(text: str) -> list[str]:
        """Kinds of the Markdown elements, without the texts, the rows of tables, and items of lists."""
        tokens = [token for block in markdown.parse(text) for token in (block, *(block.children or ()))]
        return sorted({token.type for token in tokens})

    assert structure(card) == structure(clean)
    rendered = markdown.render(card)
    assert "<script" not in rendered
    assert "<img" not in rendered
    assert "<a " not in rendered
    assert rendered.count("<h1>") == 1
    assert rendered.count("<h2>") == markdown.render(clean).count("<h2>")
    assert rendered.count("<td") == 6  # two scores of three columns


def test_strings_of_the_configuration_are_shown_as_text(run, tmp_path):
    found = checkpoint.read(run / "checkpoint.safetensors").config
    data = {"kind": "arrays", "path": f"{HOSTILE.replace('/', '')}.npz"}
    card = export_run(rewritten(run, tmp_path / "run", config=found["config"] | {"data": data}), tmp_path / "out")
    rendered = MarkdownIt("commonmark", {"html": True}).enable("table").render((card / "README.md").read_text())
    assert "<script" not in rendered
    assert "<img" not in rendered
    assert rendered.count("<h1>") == 1


# --- commands ---------------------------------------------------------------------------------------------------------


def command(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exception is None or isinstance(done.exception, ValueError | SystemExit), done.exception
    return done.output + str(done.exception or "")


def test_an_export_is_sampled_scored_and_trained_further(run, tmp_path):
    out = tmp_path / "out"
    assert f"README.md to {out}" in command("export", run, out, "--license", "cc0-1.0")
    for folder in (run, out):
        assert "4 samples" in command(
            "sample", folder, "--seeds", "0-3", "--steps", 2, "--out", tmp_path / f"{folder.name}.npz"
        )
    assert np.array_equal(*(np.load(tmp_path / f"{folder.name}.npz")["arr_0"] for folder in (run, out)))
    scores = tmp_path / "scores.jsonl"
    command("evaluate", out, "--samples", 4, "--steps", 2, "--features", "pixels", "--out", scores)
    assert json.loads(scores.read_text().splitlines()[0])["samples"]["checkpoint"] == open_run(out).checksum
    command("train", "--init-from", out, "--out", tmp_path / "next", "--set", "training.images=32")
    assert open_run(tmp_path / "next").images == 32


def test_an_export_is_not_resumed_and_not_trained_over(exported):
    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    assert "is an export, which has no state of the optimizer" in command("train", "--resume", exported)
    assert "holds an exported model; change --out" in command("train", "--out", exported)
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before


# --- the Hugging Face hub ---------------------------------------------------------------------------------------------


@pytest.fixture
def cache(run, tmp_path, monkeypatch) -> Path:
    """A cache of the hub, without network, that holds two revisions of alice/digits: the average, and the model."""
    folder = tmp_path / "hub" / "models--alice--digits"
    for number, (revision, weights) in enumerate({"main": "average", "v1": "model"}.items()):
        exported = export_run(run, tmp_path / revision, weights=weights)
        commit = str(number) * 40
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / revision).write_text(commit)
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for file in exported.iterdir():  # as the hub's cache has it: links to blobs
            blob = folder / "blobs" / f"{number}{file.name}"
            blob.parent.mkdir(exist_ok=True)
            shutil.copy(file, blob)
            os.symlink(os.path.relpath(blob, snapshot), snapshot / file.name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return folder


@pytest.mark.parametrize(
    ("revision", "weights"), [("", "average"), ("@v1", "model"), ("@" + "0" * 40, "average"), ("@" + "1" * 40, "model")]
)
def test_a_revision_of_a_model_of_the_hub_is_read_from_its_cache(revision, weights, cache, run):
    name = f"hf:alice/digits{revision}"
    assert same(stablefield.load(name), stablefield.load(run, weights=weights))
    opened = open_run(name)
    assert str(opened.path) == name
    with pytest.raises(ConfigError, match=r"has no folder on this machine; choose one with --out"):
        _ = opened.folder


def test_samples_of_a_model_of_the_hub_need_a_place(cache, tmp_path):
    before = sorted(cache.rglob("*"))
    assert "choose one with --out" in command("sample", "hf:alice/digits", "--seeds", 0, "--steps", 2)
    assert "1 samples" in command("sample", "hf:alice/digits", "--seeds", 0, "--steps", 2, "--out", tmp_path / "s")
    assert sorted(cache.rglob("*")) == before


@pytest.mark.parametrize("name", ["hf:alice/other", "hf:alice/digits@v2"])
def test_a_model_that_is_not_in_the_cache_is_one_line(name, cache):
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read from the Hugging Face hub or its cache: .") as e:
        stablefield.load(name)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "name", ["hf:", "hf:digits", "hf:../x", "hf:a/b/c", "hf:a/..", "hf:a/b@", "hf:a/b@x y", "hf:/a"]
)
def test_a_name_of_another_form_is_refused_before_anything_is_asked(name):
    with pytest.raises(CheckpointError, match="is not the name of a model; write hf:OWNER/NAME"):
        open_run(name)
