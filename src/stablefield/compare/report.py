from pathlib import Path


def write_report(out: Path):
    pass
