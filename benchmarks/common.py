"""What the benchmarks share: whose machine, how long, how much memory."""

import datetime
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch


def headline(script: str) -> str:
    """The command, machine and date that stand beside every figure."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return (
        f"{Path(script).name} {' '.join(sys.argv[1:])}\n"
        f"{datetime.date.today()}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )


def interleaved(candidates: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, tuple[float, float, float]]:
    """Seconds of each candidate: median and quartiles over rounds in which all take turns, after one to warm up.

    Taking turns makes ratios fair: what slows the machine down slows all of them.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, work in candidates.items():
            start = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: _quartiles(found) for name, found in times.items()}


def peak_memory(script: str, *arguments: str) -> float:
    """MB that a part of a script took beyond its inputs, in a process of its own that prints it."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    return float(done.stdout.split()[-1])


def peak_of(work: Callable[[], object]) -> float:
    """MB that this process took at most while at work, beyond what it had before (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
