"""Time of `import stablefield` beyond `import torch`, each in a process of its own, in turns.

python benchmarks/import_time.py
"""

import argparse
import subprocess
import sys

from common import headline, interleaved


def main(repeats: int) -> None:
    times = interleaved(
        {
            name: lambda name=name: subprocess.run([sys.executable, "-c", f"import {name}"], check=True)
            for name in ("torch", "stablefield")
        },
        repeats,
    )
    for name, (middle, low, high) in times.items():
        print(f"  import {name:12} {middle:6.2f} s   ({low:.2f} to {high:.2f})")
    print(f"  stablefield adds {times['stablefield'][0] - times['torch'][0]:6.2f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="number of rounds (7)")
    options = parser.parse_args()
    print(headline(__file__))
    main(options.repeats)
