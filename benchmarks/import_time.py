"""Processor time of short commands and imports, as ratios to `import torch`, each in a process of its own, in turns.

python benchmarks/import_time.py

Help, version and recipes import no torch; a dry run may take one second more than `import torch`.
"""

import argparse
import resource
import subprocess
import sys

from common import headline

COMMANDS = {
    "import torch": ["-c", "import torch"],
    "import stablefield": ["-c", "import stablefield"],
    "stablefield --help": ["-m", "stablefield", "--help"],
    "stablefield --version": ["-m", "stablefield", "--version"],
    "stablefield recipes": ["-m", "stablefield", "recipes"],
    "stablefield train --help": ["-m", "stablefield", "train", "--help"],
    "stablefield evaluate --help": ["-m", "stablefield", "evaluate", "--help"],
    "stablefield train --dry-run": ["-m", "stablefield", "train", "--dry-run"],
}


def processor_time(arguments: list[str]) -> float:
    """User and system time of a Python process, in seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main(repeats: int) -> None:
    """Measure and print the medians."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(repeats):
        for name, arguments in COMMANDS.items():
            times[name].append(processor_time(arguments))
    medians = {name: sorted(found)[repeats // 2] for name, found in times.items()}
    torch = medians["import torch"]
    for name, median in medians.items():
        spread = f"({min(times[name]):.2f} to {max(times[name]):.2f})"
        print(f"  {name:28} {median:6.2f} s   {spread}   {median / torch:5.2f} x import torch, {median - torch:+.2f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="number of rounds (5)")
    options = parser.parse_args()
    print(headline(__file__))
    main(options.repeats)
