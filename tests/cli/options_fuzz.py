"""Run commands with hostile options and settings; `test_hostile_options.py` runs this in its own process.

    python options_fuzz.py SEED ROUNDS FOLDER

The folder holds a run and data. Prints the number of commands by their exit status, and those that failed: with an
error that the command line does not print as lines of text, after ten seconds of processor time, by starting a program,
or beyond 1 GB of memory.
"""

import contextlib
import io
import json
import os
import random
import resource
import signal
import sys
import traceback

import typer

from stablefield import cli
from stablefield.config.reference import describe_config

NUMBERS = ["nan", "inf", "-inf", "-1", "0", "-0.0", "1e-320", "1e18", "2147483648", "1" + "0" * 400, "0x10", "1_0", "½"]
TEXTS = [
    "",
    " ",
    "x",
    "a,b",
    ",",
    "-",
    "0-",
    "9-0",
    "0-4294967296",
    "[]",
    "[[",
    "{}",
    "null",
    "true",
    "\x1b[2J",
    "a\nb",
]
PATHS = [
    "missing",
    ".",
    "/",
    "..",
    "run",
    "data.npz",
    "vectors.npy",
    "cut.npz",
    "page.html",
    "empty",
    "x" * 300,
    "\x07.npz",
]
KINDS = ["stf", "dsm:0", "stf:-1", "stf:nan", "knn:x", "exact,missing_mass=2", "os:system", "hf:", "auto", "cuda:99"]
FORBIDDEN = {"os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "os.fork", "socket.connect", "shutil.rmtree"}
FEW = {
    "sample": ["run", "--seeds", "0-1", "--steps", "2", "--out", "made/samples"],
    "evaluate": ["run", "--samples", "2", "--steps", "2", "--features", "pixels", "--out", "made/scores.jsonl"],
    "train": ["--data", "data.npz", "--dry-run"],
    "compare": ["--data", "vectors.npy", "--out", "made/compared", "--stop-after", "0s", "--set", "network.kind=mlp"],
    "convert": ["run", "made/converted"],
    "field": [
        "vectors.npy",
        "--noise-levels",
        "2",
        "--sizes",
        "2",
        "--examples",
        "2",
        "--draws",
        "3",
        "--out",
        "made/f",
    ],
    "floor": ["vectors.npy", "--bins", "1", "--examples", "2", "--out", "made/floor"],
    "config": [],
    "recipes": [],
    "data convert": ["data.npz", "made/store"],
    "data inspect": ["data.npz", "--no-noise"],
}
KEYS = [
    (f"{entry.section}.{key.name}", f"{entry.section}.kind={entry.kind}")
    for section in ("data", "process", "times", "weight", "preconditioning", "network", "target", "augmentation")
    for entry in describe_config(section)
    for key in entry.keys
] + [(f"training.{key.name}", "") for entry in describe_config("training") for key in entry.keys]


def commands():
    """The parameters of every command, by its name."""
    group = typer.main.get_command(cli.app)
    for name, command in group.commands.items():
        for sub, part in getattr(command, "commands", {"": command}).items():
            yield f"{name} {sub}".strip(), part.params


def words(name, parameters, draw):
    """A command line with a few hostile arguments, options and settings."""
    found = [*name.split(), *FEW[name]]
    options = [parameter for parameter in parameters if parameter.param_type_name == "option"]
    for _ in range(draw.choice([0, 1, 1, 2]) if options else 0):
        option, value = draw.choice(options), draw.choice(NUMBERS + TEXTS + PATHS + KINDS)
        found += [draw.choice(option.opts)] if option.is_flag else [draw.choice(option.opts), value]
    if any("--set" in option.opts for option in options):
        for _ in range(draw.choice([0, 1, 1, 2])):
            key, kind = draw.choice(KEYS)
            found += ["--set", kind] * bool(kind) + ["--set", f"{key}={draw.choice(NUMBERS + TEXTS)}"]
    if draw.random() < 0.2:
        place = draw.randrange(len(name.split()), len(found) + 1)
        found[place : place + draw.randrange(2)] = [draw.choice(PATHS + TEXTS)]
    return [word.replace("\0", "") for word in found]


def outcome(arguments):
    """Exit status and output of a command."""
    output = io.StringIO()
    sys.argv = ["stablefield", *arguments]
    signal.setitimer(signal.ITIMER_PROF, 10)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            cli.main()
        status = 0
    except SystemExit as end:
        status = end.code or 0
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return status, output.getvalue()


def watch(event, arguments):
    if event in FORBIDDEN and not (event == "shutil.rmtree" and ".tmp-" in str(arguments[0])):
        raise AssertionError(f"{event} {arguments}")


def late(number, frame):
    raise AssertionError("ten seconds of processor time have passed")


def main(seed, rounds, folder):
    os.chdir(folder)
    draw, counts = random.Random(int(seed)), {}
    known = [(name, parameters) for name, parameters in commands() if name in FEW]
    assert len(known) == len(FEW)
    signal.signal(signal.SIGPROF, signal.SIG_IGN)
    for name, _ in known:  # what is imported on first use is imported here
        outcome([*name.split(), *FEW[name]])
    signal.signal(signal.SIGPROF, late)
    sys.addaudithook(watch)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + 2**30, used + 2**30))
    failures = []
    for _ in range(int(rounds)):
        arguments = words(*draw.choice(known), draw)
        try:
            status, output = outcome(arguments)
            counts[str(status)] = counts.get(str(status), 0) + 1
            assert status in (0, 1, 2, 75), status
            assert "Traceback" not in output
            error = output[output.rfind("stablefield: ") :] if status == 1 else ""
            assert error.replace("\n", "").isprintable(), error  # other output may repeat what the user typed
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            place = traceback.extract_tb(error.__traceback__)[-3:]
            failures.append(f"{arguments}: {error!r:.300} {[(p.filename[-40:], p.lineno) for p in place]}")
    print(json.dumps({"counts": counts, "failures": failures}))


if __name__ == "__main__":
    main(*sys.argv[1:])
