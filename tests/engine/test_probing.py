"""A run measures the excess of its network, and training does not notice."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from short_runs import Interrupted, configured, interrupt_at, same, trained, untimed
from test_distributed import on_ranks, probed_run

from stablefield.build import build
from stablefield.cli.training import progress_text
from stablefield.config import resolve
from stablefield.distributed import Ranks
from stablefield.engine.probing import RunProbes, target_name
from stablefield.engine.session import initial_state
from stablefield.floor import Probes, SquaredError
from stablefield.pool import Pool
from stablefield.run import RunFolder, load
from stablefield.targets import DSMTarget, ExactTarget, KNNTarget, Prefetched, STFTarget

PROBED = ("training.probe_every=96", "training.probes=4", "data.holdout=60")
EXCESS = "loss/excess"
MLP = {"kind": "mlp", "width": 8, "layers": 1}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("probed") / "run"
    trained(folder, *PROBED)
    return folder


def measured(folder: Path) -> dict[int, dict]:
    lines = RunFolder(folder).history()
    return {round(1000 * line["progress/kimg"]): line for line in lines if EXCESS in line}


def test_probes_are_due_at_image_counts_and_at_the_end(whole):
    assert list(measured(whole)) == [96, 192, 288, 320]


def test_probing_does_not_change_the_weights(whole, tmp_path):
    trained(tmp_path, *PROBED, "training.probe_every=0")
    assert same(whole, tmp_path)
    assert not measured(tmp_path)
    assert not RunFolder(tmp_path).loss_figure.exists()


@pytest.mark.parametrize("stop", [64, 96, 128])
def test_a_probed_run_resumes_bit_for_bit(whole, tmp_path, stop):
    with pytest.raises(Interrupted):
        trained(tmp_path, *PROBED, on_step=interrupt_at(stop))
    trained(tmp_path, *PROBED)
    assert same(whole, tmp_path)
    assert untimed(tmp_path) == untimed(whole)


def test_the_metrics_are_those_of_the_saved_networks(whole):
    config, line = configured(*PROBED), measured(whole)[320]
    components = build(config)
    loss = SquaredError.of_objective(components.objective, components.denoiser.process)
    probes = Probes(components.pool, loss, per_bin=4, target="stf:16")
    for name, weights in (("excess", "model"), ("excess_average", "average")):
        found = probes.excess(load(whole, weights=weights, device="cpu"))
        assert line[f"loss/{name}"] == pytest.approx(found.value, rel=1e-5)
        by_noise = [value for key, value in line.items() if key.startswith(f"{name}_by_noise/")]
        assert by_noise == pytest.approx(found.by_bin.tolist(), rel=1e-4)
    assert line["loss/floor_dsm"] == pytest.approx(probes.floor("dsm").value, rel=1e-5)
    assert line["loss/floor_target"] == pytest.approx(probes.floor("stf:16").value, rel=1e-5)
    assert 0 < line["loss/floor_target"] < line["loss/floor_dsm"] < line["edm/floor_dsm"]


def test_held_out_images_have_a_loss_and_a_distance_from_the_training_mean(whole):
    line = measured(whole)[320]
    assert line["held_out/probe_loss"] > 0
    assert line["held_out/distance_to_training_mean"] > 0


def test_two_networks_under_two_targets_have_equal_floors_and_initial_excess():
    lines = []
    for target in ("dsm", "stf", "exact"):
        config = resolve({"network": MLP, "training": {"probes": 4}, "target": {"kind": target}})
        components = build(config)
        lines.append(RunProbes(config, components, Ranks(torch.device("cpu")))(initial_state(config, components)))
    for line in lines[1:]:
        assert line["loss/excess"] == lines[0]["loss/excess"]
        assert line["loss/floor_dsm"] == pytest.approx(lines[0]["loss/floor_dsm"], rel=1e-6)
    assert lines[-1]["loss/floor_target"] == 0


@pytest.mark.parametrize("process", ["vp", "flow"])
def test_edms_yardstick_is_measured_beside_the_loss_of_any_process(process):
    config = configured("training.probes=4", f"process.kind={process}")
    components = build(config)
    line = RunProbes(config, components, Ranks(torch.device("cpu")))(initial_state(config, components))
    ve = configured("training.probes=4")
    of_ve = RunProbes(ve, build(ve), Ranks(torch.device("cpu")))(initial_state(ve, build(ve)))
    assert line["edm/floor_dsm"] == pytest.approx(of_ve["edm/floor_dsm"], rel=1e-4)


def test_the_log_says_that_probes_are_not_augmented(caplog):
    unet = {"kind": "unet", "channels": 8}
    config = resolve({"network": unet, "training": {"probes": 2}, "augmentation": {"kind": "edm"}})
    components = build(config)
    with caplog.at_level(logging.WARNING):
        RunProbes(config, components, Ranks(torch.device("cpu")))(initial_state(config, components))
    assert "identity map" in caplog.text


def test_the_figure_of_the_loss_is_written(whole):
    with Image.open(RunFolder(whole).loss_figure) as image:
        assert image.format == "PNG"


def test_the_progress_line_names_excess_and_floor(tmp_path):
    lines: list[str] = []
    trained(tmp_path, *PROBED, on_step=lambda images, metrics: lines.append(progress_text(metrics)))
    assert "excess" not in lines[0]
    assert "(stf:16)" in lines[-1]
    assert lines[-1].index("loss") < lines[-1].index("excess") < lines[-1].index("floor")


def test_the_first_progress_line_after_a_resume_has_the_excess_that_was_measured_last(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    lines: list[str] = []
    longer = (*PROBED, "training.images=384")
    trained(tmp_path / "run", *longer, on_step=lambda images, metrics: lines.append(progress_text(metrics)))
    last, new = measured(whole)[320], measured(tmp_path / "run")[384]
    for line, metrics in ((lines[0], last), (lines[-1], new)):
        assert f"excess {metrics['loss/excess']:.4f}, floor {metrics['loss/floor_target']:.4f} (stf:16)" in line
    assert lines[0] != lines[-1]


def test_targets_have_the_names_of_the_command_line():
    pool = Pool(torch.zeros(8, 2))
    assert target_name(DSMTarget()) == "dsm"
    assert target_name(STFTarget(pool, 4)) == "stf:4"
    assert target_name(Prefetched(ExactTarget(pool), 8)) == "exact"
    assert target_name(KNNTarget(pool, 2)) == "knn:2"
    approximate = KNNTarget(pool, 2)
    object.__setattr__(approximate, "search", "faiss")  # which need not be installed
    assert target_name(approximate) is None


def test_two_ranks_measure_what_one_measures(tmp_path):
    one = probed_run(Ranks(torch.device("cpu")))
    two = on_ranks(2, tmp_path, probed_run)
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-9)
