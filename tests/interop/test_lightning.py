"""Lightning, and the plain loops: the scripts of the pages, gathering, and resuming from a checkpoint."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pages import blocks, check, run, sides

from stablefield import StableTarget
from stablefield.stable import Bank, WithIndex

DATA = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def lightning():
    return pytest.importorskip("lightning")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("unchecked", "lightning")
def test_the_script_of_the_page_keeps_its_weights_with_one_candidate(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    check("lightning.md", 0)
    for language, code in blocks("lightning.md"):
        if language == "python":
            run(code, {})


def module_of(lightning, stable: StableTarget):
    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.seen = torch.nn.Linear(4, 4), []

        def training_step(self, batch, batch_idx):
            x, index = batch
            generator = torch.Generator().manual_seed(self.global_step)
            noise = torch.randn(x.shape, generator=generator)
            target = stable(noise, x + noise, x, alpha=1.0, sigma=1.0, index=index)
            self.seen.append(target.clone())
            return (self.network(x + noise) - target).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Module()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", ["bank", "data"])
def test_training_that_resumes_from_a_checkpoint_has_the_same_targets(lightning, kind: str, tmp_path: Path) -> None:
    from stablefield.interop.lightning import StableTargetCallback

    loader = torch.utils.data.DataLoader(WithIndex(DATA), batch_size=8)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}

    def train(epochs: int, checkpoint: Path | None = None):
        torch.manual_seed(0)
        stable = StableTarget(Bank(32)) if kind == "bank" else StableTarget(DATA, size=16)
        module = module_of(lightning, stable)
        callbacks = [StableTargetCallback(stable)]
        trainer = lightning.Trainer(
            max_epochs=epochs, callbacks=callbacks, default_root_dir=tmp_path, enable_checkpointing=False, **options
        )
        trainer.fit(module, loader, ckpt_path=checkpoint, weights_only=False)
        return trainer, module

    _, whole = train(2)
    trainer, _ = train(1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    _, rest = train(2, tmp_path / "half.ckpt")
    assert len(rest.seen) == 8
    for found, wanted in zip(rest.seen, whole.seen[8:], strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(rest.network.weight, whole.network.weight)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("unchecked")
def test_the_effective_sample_size_is_logged(lightning, tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    from stablefield.interop.lightning import StableTargetCallback

    stable = StableTarget(DATA, size=16)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=CSVLogger(tmp_path),
        log_every_n_steps=4,
        callbacks=[StableTargetCallback(stable)],
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    trainer.fit(module_of(lightning, stable), torch.utils.data.DataLoader(WithIndex(DATA), batch_size=8))
    lines = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()
    assert "target/ess" in lines[0]
    assert len(lines) == 3
    assert float(trainer.callback_metrics["target/ess"]) == pytest.approx(float(stable.ess.mean()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("unchecked")
def test_the_excess_of_the_loss_is_logged_and_the_network_trains_on(lightning) -> None:
    from stablefield.floor import Probes, SquaredError
    from stablefield.interop.lightning import LossExcessCallback
    from stablefield.times import LogNormal

    probes = Probes(DATA, SquaredError(times=LogNormal(0.0, 1.0), prediction_type="epsilon"), per_bin=4)
    module = module_of(lightning, StableTarget(DATA, size=16))
    module.dropout, modes = torch.nn.Dropout(), []
    module.dropout.eval()  # a frozen part stays as it was

    def prediction(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        modes.append(module.training)
        return module.network(x_t)

    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        callbacks=[LossExcessCallback(probes, prediction, every=4)],
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(WithIndex(DATA), batch_size=8))
    assert modes == [False] * 2
    assert module.training
    assert not module.dropout.training
    wanted = probes.excess(lambda x_t, t: module.network(x_t))
    assert float(trainer.callback_metrics["loss/excess"]) == pytest.approx(wanted.value, rel=1e-5)
    assert float(trainer.callback_metrics["loss/floor_dsm"]) == pytest.approx(probes.floor("dsm").value, rel=1e-5)
    with pytest.raises(ValueError, match="at least 1 step, not 0"):
        LossExcessCallback(probes, every=0)


@pytest.mark.usefixtures("lightning")
def test_gather_concatenates_what_lightning_stacks() -> None:
    from stablefield.interop.lightning import gather

    x = torch.arange(6).view(3, 2)
    assert torch.equal(gather(SimpleNamespace(all_gather=lambda t: t))(x), x)
    two = gather(SimpleNamespace(all_gather=lambda t: torch.stack([t, t + 10])))
    assert torch.equal(two(x), torch.cat([x, x + 10]))
    assert two(x[:, 0]).shape == (6,)


def test_the_callback_without_lightning_says_what_is_missing(monkeypatch) -> None:
    from stablefield.interop import lightning as ours

    monkeypatch.setattr(ours, "Callback", object)
    with pytest.raises(ImportError, match="needs the extra `lightning`"):
        ours.StableTargetCallback(StableTarget())


@pytest.mark.usefixtures("unchecked")
def test_the_edm_loop_of_the_page_keeps_its_weights_with_one_candidate() -> None:
    pytest.importorskip("sklearn")
    check("edm.md", 0)


@pytest.mark.usefixtures("unchecked")
def test_student_t_noise_is_refused_as_the_page_says(capsys) -> None:
    for _, code in blocks("physicsnemo.md"):
        run(code, {})
    assert re.match(r"the mean square of \(x_t - alpha x\) / sigma is 1\.6\d", capsys.readouterr().out)


def test_a_diff_has_two_sides() -> None:
    assert sides(" a\n-b\n+c\n+d\n") == ("a\nb", "a\nc\nd")
