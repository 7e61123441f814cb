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


def interleaved(
    candidates: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, tuple[float, float, float]]:
    """Seconds of each candidate: median, minimum and maximum over rounds in which each runs once, after a warm-up.

    Running them in turns makes ratios fair, because a slow phase of the machine affects all of them.

    Args:
        candidates: functions to time, by name.
        rounds: number of rounds.
        clock: returns seconds; the clock on the wall by default.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        for name, work in candidates.items():
            start = clock()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                times[name].append(clock() - start)
    return {name: (statistics.median(values), min(values), max(values)) for name, values in times.items()}


def processor_clock() -> Callable[[], float]:
    """The clock for computations: processor time where one thread computes, which other processes disturb less."""
    one_thread = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.process_time if one_thread else time.perf_counter


def clock_name() -> str:
    """Name of the time that `processor_clock` measures, to print above results."""
    return "processor time" if processor_clock() is time.process_time else "wall-clock time"


def printed(script: str, *arguments: str) -> list[float]:
    """The numbers in the last line that a script prints in a process of its own."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
    return [float(word) for word in done.stdout.splitlines()[-1].split()]


def peak_memory(script: str, *arguments: str) -> float:
    """Peak memory in MB, as a script prints it in a process of its own."""
    return printed(script, *arguments)[-1]


def peak_of(work: Callable[[], object]) -> float:
    """Peak memory in MB of this process during a function, beyond its memory before (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = memory("VmRSS")
    work()
    return memory("VmHWM") - before


def memory(name: str) -> float:
    """A figure of the memory of this process in MB, by its name in Linux: VmRSS, VmHWM (peak) or RssFile (mapped)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
