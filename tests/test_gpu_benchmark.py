"""The benchmark for GPUs runs on machines without one, and survives parts that fail."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def output(*arguments: str) -> str:
    command = [sys.executable, str(SCRIPT), "--self-check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_self_check_measures_precisions_targets_and_samples() -> None:
    printed = output("--parts", "precision", "targets", "exact", "sampling")
    assert "Every part ran." in printed
    for name in ("tf32", "bfloat16", "STF", "KNN", "searched", "Heun"):
        assert name in printed


def test_a_part_without_time_is_listed_and_the_script_ends_well() -> None:
    printed = output("--seconds", "0", "--parts", "precision", "sampling")
    assert "Not run:" in printed
    assert "precision: cut short" in printed
    assert "sampling: cut short" in printed
