"""Class-conditional references from a memory map of means and standard deviations."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pages import blocks, run

from stablefield import StableTarget


@pytest.mark.usefixtures("unchecked")
def test_the_loop_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [(_, code)] = blocks("latents.md")
    names = run(code, {})
    assert names["stable"].calls == 63
    assert torch.isfinite(names["target"]).all()


def stable_of(moments: np.ndarray, labels: torch.Tensor, size: int | None) -> StableTarget:
    own = torch.Generator().manual_seed(0)

    def draw(stored: torch.Tensor) -> torch.Tensor:
        mean, std = stored.float().chunk(2, 1)
        return mean + std * torch.randn(mean.shape, generator=own)

    return StableTarget(moments, "velocity", labels=labels, size=size, transform=draw)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("size", [1, 8, None])
def test_references_come_from_the_class_of_each_example_only(size: int | None, tmp_path: Path) -> None:
    # classes are far apart: a reference of another class would show in the target
    labels = torch.arange(400) % 40
    moments = torch.cat([100.0 * labels[:, None].expand(-1, 4), torch.full((400, 4), 0.1)], 1).half()
    np.save(tmp_path / "moments.npy", moments.numpy()[..., None, None])
    stable = stable_of(np.load(tmp_path / "moments.npy", mmap_mode="r"), labels, size)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        index = torch.randint(400, (32,), generator=generator)
        x = moments[index, :4].float()[..., None, None] + 0.1 * torch.randn(32, 4, 1, 1, generator=generator)
        noise, t = torch.randn(x.shape, generator=generator), torch.rand(32, 1, 1, 1, generator=generator)
        target = stable(noise - x, (1 - t) * x + t * noise, x, alpha=1 - t, sigma=t, index=index, label=labels[index])
        mean = x - t * (target - (noise - x))
        assert ((mean - 100.0 * labels[index][:, None, None, None]).abs() < 1).all()
        assert torch.equal(target, noise - x) == (size == 1)


@pytest.mark.usefixtures("unchecked")
def test_the_work_of_a_call_does_not_grow_with_the_number_of_classes() -> None:
    operations = {}
    for classes in (50, 5000):
        labels = torch.arange(20 * classes) % classes
        stable = StableTarget(torch.randn(len(labels), 3), labels=labels, size=4, checks=0)
        index = torch.randperm(len(labels))[:16]
        x, noise = torch.randn(2, 16, 3).unbind()
        for _ in range(2):  # the first call sorts the labels
            with torch.profiler.profile() as profile:
                stable(noise, x + noise, x, alpha=1.0, sigma=1.0, index=index, label=labels[index])
        operations[classes] = len(profile.events())
    assert abs(operations[50] - operations[5000]) < 0.2 * operations[50]
