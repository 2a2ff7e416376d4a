"""Folders of deltas and of PEFT adapters hold what was before or all of the new: killed, full, raced and odd ones."""

import contextlib
import fcntl
import multiprocessing
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import folders
import pytest
from tiers import breadth

from jdelta.saved import folder

FILES = {
    "jdelta": ["README.md", "delta.safetensors", "delta_config.json"],
    "peft": ["adapter_config.json", "adapter_model.safetensors"],
}
each_format = pytest.mark.parametrize("name", ["jdelta", "peft"])


def left(path: Path) -> set[str]:
    return {found.name for found in path.rglob("*")}


# --- killed


@pytest.mark.parametrize("case", breadth(["jdelta old", "jdelta ", "peft old", "peft "], "jdelta old"))
def test_a_kill_at_any_step_leaves_the_old_or_the_new(case, tmp_path):
    name, old = case.split(" ")
    form, before = folders.formats()[name], 1 if old else None
    program = [sys.executable, folders.__file__, name, str(tmp_path), *([old] if old else [])]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    last = int(done.stdout)
    assert last >= 9
    found = []
    for step in range(1, last + 1):
        path = tmp_path / str(step) / "out"
        found.append(form.read(path) if path.exists() else None)
        if (path / form.config).exists():  # and programs that know nothing of what is beside read no mixture
            plain = shutil.copytree(path, tmp_path / "plain", ignore=shutil.ignore_patterns(".jdelta.*"))
            assert form.read(plain) == found[-1]
            shutil.rmtree(plain)
        form.write(path, 3)
        assert form.read(path) == 3
        assert left(path.parent) == {"out"} | form.files
    assert found == sorted(found, key=lambda number: number == 2)  # a moment after which it is the new
    assert set(found) == {before, 2}
    often = tmp_path / "often" / "out"
    form.write(often, 3)
    assert form.read(often) == 3
    assert left(often.parent) == {"out"} | form.files  # of all the thirty, nothing


def test_what_another_machine_left_is_removed_after_a_day(tmp_path):
    form, long_ago = folders.formats()["jdelta"], time.time() - 25 * 3600
    form.write(tmp_path, 1)
    for name in ("a" * 16, "b" * 16):
        (tmp_path / f".jdelta.{name}").mkdir()
    os.utime(tmp_path / f".jdelta.{'b' * 16}", (long_ago, long_ago))
    form.write(tmp_path, 2)
    assert left(tmp_path) == {*form.files, f".jdelta.{'a' * 16}"}


def flock_of(error: OSError | None):
    """A lock that other machines hold, or hold not, too: those of folders are none there."""

    def lock(descriptor, operation, real=fcntl.flock):
        if error is not None:
            raise error
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            real(descriptor, operation)

    return lock


@each_format
@pytest.mark.parametrize("machines", [1, 2])
def test_what_a_living_writer_has_is_left_to_it(name, machines, tmp_path, monkeypatch):
    if machines == 2:
        monkeypatch.setattr(fcntl, "flock", flock_of(None))
    form, path = folders.formats()[name], tmp_path / "out"
    form.write(path, 1)
    began, go_on, write = threading.Event(), threading.Event(), folder.write_durably

    def slowly(file, data):
        if threading.current_thread() is slow:
            began.set()
            go_on.wait(60)
        write(file, data)

    monkeypatch.setattr(folder, "write_durably", slowly)
    slow = threading.Thread(target=form.write, args=(path, 2))
    slow.start()
    began.wait(60)
    other = threading.Thread(target=form.write, args=(path, 3))
    other.start()
    other.join(0.2)
    assert other.is_alive()  # it waits for its turn
    assert form.read(path) == 1  # and readers need none
    go_on.set()
    slow.join(60)
    other.join(60)
    assert form.read(path) == 3
    assert left(path) == form.files


def test_who_waits_for_a_lock_that_is_removed_waits_for_the_next(tmp_path):
    form, lock = folders.formats()["jdelta"], tmp_path / ".jdelta.lock"
    form.write(tmp_path, 1)
    first = os.open(lock, os.O_RDWR | os.O_CREAT)
    fcntl.flock(first, fcntl.LOCK_EX)
    waiting = threading.Thread(target=form.write, args=(tmp_path, 2))
    waiting.start()
    waiting.join(0.1)
    lock.unlink()
    with folder._turn(tmp_path):
        os.close(first)
        waiting.join(0.2)
        assert waiting.is_alive()
    waiting.join(60)
    assert form.read(tmp_path) == 2
    assert left(tmp_path) == form.files


def test_without_locks_a_save_warns_and_removes_nothing(tmp_path, monkeypatch):
    form = folders.formats()["jdelta"]
    form.write(tmp_path, 1)
    other = tmp_path / f".jdelta.{folder._HERE}{'a' * 8}"
    other.mkdir()
    monkeypatch.setattr(fcntl, "flock", flock_of(OSError(37, "No locks available")))
    with pytest.warns(UserWarning, match=r"has no locks .* one program at a time"):
        form.write(tmp_path, 2)
    assert form.read(tmp_path) == 2
    assert left(tmp_path) == {*form.files, other.name}


def test_a_writer_that_does_not_end_is_an_error(tmp_path, monkeypatch):
    form, path = folders.formats()["jdelta"], tmp_path / "out"
    form.write(path, 1)
    monkeypatch.setattr(folder, "_PATIENCE", 0.1)
    with folder._turn(path):
        assert stat.S_IMODE((path / ".jdelta.lock").stat().st_mode) == 0o666  # whoever may write there may wait for it
        with pytest.raises(TimeoutError, match="another process has been writing"):
            form.write(path, 2)
    assert form.read(path) == 1


# --- raced


def write_often(name: str, path: Path, number: int, rounds: int) -> None:
    for _ in range(rounds):
        folders.formats()[name].write(path, number)


def read_often(name: str, path: Path, end: threading.Event, failed: list, numbers: set) -> None:
    while not end.is_set():
        try:
            numbers.add(folders.formats()[name].read(path))
        except Exception as error:  # whatever it is, it is what this looks for
            failed.append(error)


@each_format
@pytest.mark.parametrize("rounds", breadth([5, 500], 5))
def test_writers_take_turns_and_a_reader_beside_them_finds_one_of_the_two(name, rounds, tmp_path):
    form, path, end, failed, numbers = folders.formats()[name], tmp_path / "out", threading.Event(), [], set()
    form.write(path, 1)
    reader = threading.Thread(target=read_often, args=(name, path, end, failed, numbers))
    writers = [threading.Thread(target=write_often, args=(name, path, number, rounds)) for number in (1, 2)]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    end.set()
    reader.join()
    assert not failed
    assert numbers <= {1, 2}
    assert form.read(path) in {1, 2}
    assert left(path) == form.files


@each_format
@pytest.mark.parametrize("rounds", breadth([5, 60], 5))
def test_of_two_that_make_a_folder_at_a_time_one_is_there(name, rounds, tmp_path):
    form = folders.formats()[name]
    for each in range(rounds):
        path, start, failed = tmp_path / str(each), threading.Barrier(2), []

        def make(number, path=path, start=start, failed=failed):
            start.wait()
            try:
                form.write(path, number)
            except Exception as error:
                failed.append(error)

        threads = [threading.Thread(target=make, args=(number,)) for number in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        assert form.read(path) in {1, 2}
        assert left(path) == form.files
        assert {found.name for found in tmp_path.iterdir()} == {str(each)}
        shutil.rmtree(path)


@pytest.mark.slow
@each_format
def test_two_processes_take_turns_too(name, tmp_path):
    form, path = folders.formats()[name], tmp_path / "out"
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=write_often, args=(name, path, number, 100)) for number in (1, 2)]
    for writer in writers:
        writer.start()
    while not path.exists() and any(writer.is_alive() for writer in writers):
        time.sleep(0.01)
    reads = 0
    while any(writer.is_alive() for writer in writers):
        assert form.read(path) in {1, 2}
        reads += 1
    assert reads > 10
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert left(path) == form.files


# --- full, and odd


@each_format
def test_a_full_disk_loses_nothing(name, tmp_path):
    form = folders.formats()[name]
    form.write(tmp_path / "out", 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        for path in ("out", "new"):
            with pytest.raises(OSError, match="File too large"):
                form.write(tmp_path / path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert form.read(tmp_path / "out") == 1
    assert left(tmp_path) == {"out"} | form.files


@each_format
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
@pytest.mark.parametrize("change", ["link", "replace"])
def test_an_error_at_any_change_of_names_loses_nothing(name, error, change, tmp_path, monkeypatch):
    form, do = folders.formats()[name], getattr(os, change)
    form.write(tmp_path, 1)
    for at in range(1, 10):
        seen = 0

        def fail(*args, **kwargs):
            nonlocal seen
            seen += 1
            if seen == at:  # noqa: B023
                raise error
            do(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, change, fail)
            try:
                form.write(tmp_path, 2)
            except type(error):
                assert form.read(tmp_path) == 1
                assert left(tmp_path) == form.files
            else:
                assert form.read(tmp_path) == 2
                assert left(tmp_path) == form.files
                if seen < at:
                    break
                form.write(tmp_path, 1)


@each_format
def test_a_disk_that_is_gone_from_any_change_of_names_on_loses_nothing(name, tmp_path, monkeypatch):
    form, replace = folders.formats()[name], os.replace
    form.write(tmp_path, 1)
    for at in range(1, 4):
        seen = []

        def gone(*names):
            seen.append(names)  # noqa: B023
            if len(seen) >= at:  # noqa: B023
                raise OSError(5, "Input/output error", str(names[1]))
            replace(*names)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", gone)
            with pytest.raises(OSError, match="Input/output") if at <= len(form.files) else contextlib.nullcontext():
                form.write(tmp_path, 2)
        assert form.read(tmp_path) in {1, 2}  # it could not be undone
        form.write(tmp_path, 1)
        assert form.read(tmp_path) == 1
        assert left(tmp_path) == form.files


@pytest.mark.parametrize(
    ("name", "file"),
    [(name, file) for name, files in FILES.items() for file in files],
)
def test_a_folder_in_place_of_a_file_changes_nothing(name, file, tmp_path):
    form = folders.formats()[name]
    assert form.files == {*FILES[name]}
    form.write(tmp_path, 1)
    odd = tmp_path / file
    odd.unlink()
    odd.mkdir()
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(IsADirectoryError, match=f"{odd.name} is a folder"):
        form.write(tmp_path, 2)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert left(tmp_path) == form.files


@each_format
def test_a_file_in_the_way_and_a_folder_that_cannot_be_written(name, tmp_path, monkeypatch):
    form, file = folders.formats()[name], tmp_path / "file"
    file.write_text("mine")
    for path in (file, file / "below", file / "far" / "below"):
        with pytest.raises(NotADirectoryError, match="file is a file"):
            form.write(path, 1)
    assert file.read_text() == "mine"
    with pytest.raises(OSError, match="File name too long"):
        form.write(tmp_path / ("long" * 100), 1)

    def refuse(path, *args):
        raise PermissionError(13, "Permission denied", str(path))

    form.write(tmp_path / "out", 1)
    monkeypatch.setattr(os, "mkdir", refuse)  # root may write everywhere
    with pytest.raises(PermissionError, match="Permission denied"):
        form.write(tmp_path / "out", 2)
    assert form.read(tmp_path / "out") == 1


@each_format
def test_files_keep_their_modes(name, tmp_path):
    form = folders.formats()[name]
    form.write(tmp_path, 1)
    modes = dict(zip(sorted(form.files), (0o600, 0o640, 0o604), strict=False))
    for file, mode in modes.items():
        (tmp_path / file).chmod(mode)
    form.write(tmp_path, 2)
    assert {file: stat.S_IMODE((tmp_path / file).stat().st_mode) for file in modes} == modes


@each_format
def test_links_to_folders_are_followed_and_those_of_files_replaced(name, tmp_path):
    form, real, link = folders.formats()[name], tmp_path / "real", tmp_path / "link"
    link.symlink_to(real)  # to nothing yet
    form.write(link, 1)
    assert link.is_symlink()
    assert form.read(real) == form.read(link) == 1
    kept = tmp_path / "kept"
    os.replace(real / form.tensors, kept)
    (real / form.tensors).symlink_to(kept)
    content = kept.read_bytes()
    form.write(link, 2)
    assert form.read(link) == 2
    assert kept.read_bytes() == content
    assert not (real / form.tensors).is_symlink()
    (real / form.tensors).unlink()
    (real / form.tensors).symlink_to(tmp_path / "nothing")
    form.write(link, 3)
    assert form.read(link) == 3
    (tmp_path / "one").symlink_to(tmp_path / "two")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    with pytest.raises(OSError, match="symbolic links"):
        form.write(tmp_path / "one", 1)


def test_other_files_and_an_edited_card_stay(tmp_path):
    form = folders.formats()["jdelta"]
    form.write(tmp_path, 1)
    (tmp_path / "notes.txt").write_text("mine")
    assert folder.MARK in (tmp_path / folder.CARD).read_text()
    (tmp_path / folder.CARD).write_text("my own card")
    form.write(tmp_path, 2)
    assert form.read(tmp_path) == 2
    assert (tmp_path / folder.CARD).read_text() == "my own card"
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_damage_is_told_at_once_and_not_read_again(tmp_path):
    form = folders.formats()["jdelta"]
    form.write(tmp_path, 1)
    data = bytearray((tmp_path / folder.TENSORS).read_bytes())
    data[-1] ^= 1
    (tmp_path / folder.TENSORS).write_bytes(data)
    began = time.monotonic()
    with pytest.raises(ValueError, match=folder.TENSORS):
        form.read(tmp_path)
    assert time.monotonic() - began < 5  # nothing that waits for a writer
