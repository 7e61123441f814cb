"""Helpers of the benchmarks: description of the machine, time and memory."""

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
    """Command line, date, machine, threads and version of torch, to print above the results."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return (
        f"{Path(script).name} {' '.join(sys.argv[1:])}\n"
        f"{datetime.date.today()}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )


def interleaved(candidates: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, tuple[float, float, float]]:
    """Seconds of each candidate: median and quartiles over rounds in which each runs once, after a warm-up round.

    Running them in turns makes ratios fair, because a slow phase of the machine affects all of them.

    Args:
        candidates: functions to time, by name.
        repeats: number of rounds.
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
    return {name: _quartiles(values) for name, values in times.items()}


def peak_memory(script: str, *arguments: str) -> float:
    """Peak memory in MB, printed by a script that runs in a process of its own."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    return float(done.stdout.split()[-1])


def peak_of(work: Callable[[], object]) -> float:
    """Peak memory in MB of this process during a function, beyond its memory before (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
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
