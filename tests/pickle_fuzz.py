"""Mutate EDM's checkpoints and CIFAR's files at random and read them under audit, for the tests in their own process.

    python pickle_fuzz.py SEED ROUNDS FOLDER FILE...      (a file named test_batch is one of CIFAR's)

Prints how many were read and how many refused. Fails on any other exception, on any audit event of Python other than
reading the file, after ten seconds on one file, or when memory runs out.
"""

import json
import pickletools
import random
import resource
import signal
import sys
from pathlib import Path

import edm_files

from stablefield.data import CIFAR
from stablefield.interop import edm

HARMLESS = {"mmap.__new__", "builtins.id", "os.listdir", "os.scandir", "pathlib.Path.rglob"}  # "open" is examined
watching = False


def watch(event, arguments):
    if not watching or event in HARMLESS:
        return
    if event == "open" and arguments[1] in ("r", "rb"):
        return
    raise SystemExit(f"{event} {arguments}")


def spans(octets):
    """Positions of the instructions: everything except the numbers of tensors."""
    ranges, last = [], None
    for _, _, position in pickletools.genops(octets):
        if last is not None:
            ranges.append((last, min(position, last + 450)))  # of a tensor only the head of its archive
        last = position
    return ranges


def mutated(octets, draw):
    octets = bytearray(octets)
    ranges = spans(bytes(octets))
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        place = min(
            draw.randrange(*draw.choice(ranges)) if draw.random() < 0.9 else draw.randrange(len(octets)),
            len(octets) - 1,
        )
        match draw.randrange(6):
            case 0:
                octets[place] ^= 1 << draw.randrange(8)
            case 1:
                octets[place] = draw.randrange(256)
            case 2:
                octets[place:place] = draw.randbytes(draw.choice([1, 1, 4]))
            case 3:
                del octets[place : place + draw.choice([1, 1, 4, 100])]
            case 4:  # an instruction from elsewhere
                start, end = draw.choice(ranges)
                octets[place:place] = octets[start:end]
            case 5:
                octets[place] = draw.choice(b"()]}NRQb\x81\x82\x83\x85\x86\x87\x93\x94csuet.0")
    return bytes(octets)


def changed(octets, draw):
    """A mutation; of a ZIP file mostly of the pickle in it, with the right checksum."""
    if octets[:4] != b"PK\x03\x04":
        # in the legacy format, the pickle of the data follows three others
        head = 0 if octets[2:3] != b"\x8a" else octets.index(b".\x80", 60) + 1
        return octets[:head] + mutated(octets[head:], draw)
    if draw.random() < 0.3:  # sometimes of its directory
        place = draw.randrange(octets.index(b"PK\x01\x02"), len(octets) - 1)
        place = draw.choice([place, draw.randrange(len(octets) - 22, len(octets) - 1)])
        return octets[:place] + draw.choice([b"\x00", b"\xff", draw.randbytes(1)]) + octets[place + 1 :]
    records = edm_files.unzipped(octets)
    return edm_files.zipped(records | {"data.pkl": mutated(records["data.pkl"], draw)})


def read(path):
    return CIFAR(path.parent, split="test").contents() if path.name == "test_batch" else edm.read(path)


def outcome(path):
    global watching
    watching = True
    signal.alarm(10)
    try:
        read(path)
        return "read"
    except ValueError as error:
        return "refused" if path.name in str(error) and str(error).isprintable() else f"refused by {error!r}"
    finally:
        signal.alarm(0)
        watching = False


def main(seed, rounds, folder, *files):
    draw, counts = random.Random(int(seed)), {"read": 0, "refused": 0}  # any other key is an error
    for file in map(Path, files):
        read(file)  # modules that Python imports on first use are imported here,
    b"x".decode("cp437")  # and so is the encoding that zipfile uses for unusual names
    sys.addaudithook(watch)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + 2**30, used + 2**30))
    for file in map(Path, files):
        octets, path = file.read_bytes(), Path(folder) / "mutated" / file.name
        path.parent.mkdir(exist_ok=True)
        for _ in range(int(rounds)):
            path.write_bytes(changed(octets, draw))
            counts[outcome(path)] += 1
    print(json.dumps(counts))


if __name__ == "__main__":
    main(*sys.argv[1:])
