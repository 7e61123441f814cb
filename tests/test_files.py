"""Files and folders are complete or absent at any kill, on a full disk and between processes."""

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from stablefield.files import atomic_folder, atomic_path, cached, exclusive_lock, sweep, write_text

START = """
import resource, sys
from pathlib import Path
from stablefield.files import *
path = Path(sys.argv[1])
"""


def command(code: str, *arguments: object) -> list[str]:
    """The command that runs some code in another process."""
    return [sys.executable, "-c", START + code, *map(str, arguments)]


def fail(place: Path) -> None:
    """Write half of a file, or of a folder, and fail."""
    with (atomic_folder if place.name == "z" else atomic_path)(place) as temporary:
        (temporary / "half" if place.name == "z" else temporary).write_text("half")
        raise RuntimeError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_complete_and_replaces_the_one_before(tmp_path):
    path = tmp_path / "new" / "folder" / "x.txt"
    for text in ("one", "äβ\n" * 10_000):
        with atomic_path(path) as temporary:
            temporary.write_text(text)
            assert not path.exists() or path.read_text() == "one"
        assert path.read_text() == text
        assert names(path.parent) == ["x.txt"]


def test_an_error_leaves_what_was_there_before_and_nothing_else(tmp_path):
    path = tmp_path / "x"
    write_text(path, "before")
    for place in (path, tmp_path / "y", tmp_path / "z"):
        with pytest.raises(RuntimeError):
            fail(place)
    assert path.read_text() == "before"
    assert names(tmp_path) == ["x"]


def test_a_written_file_has_the_rights_of_any_new_file(tmp_path):
    write_text(tmp_path / "x", "text")
    (tmp_path / "y").write_text("text")
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "y").stat().st_mode


def test_a_new_file_is_refused_where_there_is_one(tmp_path, monkeypatch):
    write_text(tmp_path / "x", "one", new=True)
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "x", "two", new=True)
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links")))
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "x", "two", new=True)
    write_text(tmp_path / "y", "two", new=True)
    assert [(tmp_path / name).read_text() for name in names(tmp_path)] == ["one", "two"]


def test_a_folder_is_never_written_over_another(tmp_path):
    with atomic_folder(tmp_path / "x") as temporary:
        (temporary / "one").write_text("one")
    with pytest.raises(OSError, match=r"could not write .*x"), atomic_folder(tmp_path / "x") as temporary:
        (temporary / "two").write_text("two")
    assert names(tmp_path) == ["x"]
    assert names(tmp_path / "x") == ["one"]


FULL = """
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))
for write in (write_text, append):
    try:
        write(path, "x" * 10_000)
    except OSError as error:
        print(error)
"""


@pytest.mark.parametrize("room", [0, 1, 4_000, 9_999])
def test_a_full_disk_is_reported_with_the_name_of_the_file_which_is_unchanged(tmp_path, room):
    path = tmp_path / "x"
    path.write_text("before")
    lines = subprocess.run(command(FULL, path, room), capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"could not write {path} (File too large)") for line in lines)
    assert path.read_text() == "before"
    assert names(tmp_path) == ["x"]


def test_a_folder_that_is_a_file_or_cannot_be_written_is_reported_by_name(tmp_path, monkeypatch):
    (tmp_path / "x").write_text("a file")
    with pytest.raises(OSError, match=r"x"):
        write_text(tmp_path / "x" / "y", "text")
    monkeypatch.setattr(os, "open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied", "tmp")))
    with pytest.raises(OSError, match=r"could not write .*/z \(Permission denied\)"):
        write_text(tmp_path / "z", "text")


WAIT = """
with atomic_path(path / "file") as file, atomic_folder(path / "folder") as folder:
    file.write_text("half")
    (folder / "part").write_text("half")
    print(flush=True)
    sys.stdin.read()
"""


def test_leftovers_of_killed_processes_are_swept_and_what_is_being_written_is_not(tmp_path):
    with subprocess.Popen(command(WAIT, tmp_path), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        other = [".tmp-notes", ".hidden", "tmp-0123456789ab.x"]
        for name in other:
            (tmp_path / name).touch()
        sweep(tmp_path, tmp_path / "nowhere")
        assert len(names(tmp_path)) == 2 + len(other)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    assert len(names(tmp_path)) == 2 + len(other)
    sweep(tmp_path)
    assert names(tmp_path) == sorted(other)


COUNT = """
path.mkdir(exist_ok=True)
for _ in range(50):
    with exclusive_lock(path / "lock"):
        number = int((path / "count").read_text()) if (path / "count").exists() else 0
        write_text(path / "count", str(number + 1))
    sweep(path)
"""


def test_processes_that_count_in_a_lock_and_sweep_beside_it_lose_nothing(tmp_path):
    with ExitStack() as stack:
        counters = [stack.enter_context(subprocess.Popen(command(COUNT, tmp_path / "x"))) for _ in range(3)]
        for process in counters:
            assert process.wait(timeout=60) == 0
    assert (tmp_path / "x" / "count").read_text() == "150"


def test_a_lock_refuses_a_second_holder_who_does_not_wait(tmp_path):
    for path in (tmp_path, tmp_path / "lock"):
        with exclusive_lock(path, wait=False), pytest.raises(BlockingIOError), exclusive_lock(path, wait=False):
            pass
        with exclusive_lock(path, wait=False):
            pass


def find(path: Path) -> str | None:
    return path.read_text() if path.exists() else None


def test_a_cached_entry_is_made_once_and_leftovers_in_the_cache_are_swept(tmp_path, monkeypatch):
    monkeypatch.setenv("STABLEFIELD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".tmp-0123456789ab.entry").touch()
    made = []
    for _ in range(2):
        assert cached("entry", find, lambda path: made.append(write_text(path, "text"))) == "text"
    assert len(made) == 1
    assert names(tmp_path / "cache") == ["entry", "entry.lock"]


@pytest.mark.parametrize("fault", ["a file", "no rights", "no home"])
def test_a_cache_that_cannot_be_written_names_the_variable_that_moves_it(tmp_path, monkeypatch, fault):
    monkeypatch.setenv("STABLEFIELD_CACHE", str(tmp_path / "x" / "cache"))
    if fault == "a file":
        (tmp_path / "x").touch()
    elif fault == "no rights":
        monkeypatch.setattr(os, "access", lambda *_: False)
    else:
        monkeypatch.delenv("STABLEFIELD_CACHE")
        monkeypatch.setattr(Path, "expanduser", lambda _: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(OSError, match="set the environment variable STABLEFIELD_CACHE"):
        cached("entry", find, lambda path: write_text(path, "text"))


def test_an_entry_in_a_cache_that_cannot_be_written_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("STABLEFIELD_CACHE", str(tmp_path))
    write_text(tmp_path / "entry", "text")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert cached("entry", find, lambda path: 1 / 0) == "text"


KILLED = """
number = 0
while True:
    number += 1
    write_text(path / "x", f"{number}\\n" * 20_000)
    append(path / "lines", f"{number}\\n")
"""


def test_a_writer_that_is_killed_at_any_moment_leaves_a_complete_file(tmp_path):
    for kill in range(6):
        with subprocess.Popen(command(KILLED, tmp_path)) as writer:
            (tmp_path / "x").unlink(missing_ok=True)
            while not (tmp_path / "x").exists():
                time.sleep(0.002)
            time.sleep(0.003 * kill)
            writer.send_signal(signal.SIGKILL)
        lines = (tmp_path / "x").read_text().splitlines()
        assert len(lines) == 20_000
        assert len(set(lines)) == 1
    sweep(tmp_path)
    assert names(tmp_path) == ["lines", "x"]
