"""Storages that URIs name: what is written reaches them, and every machine (every mirror) reads all of it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from raysweep.errors import StorageError, UsageError
from raysweep.results import lock, mirror, sides
from raysweep.results.cleaning import clean
from raysweep.results.folders import list_sweeps, storage_folder, sweep_folder
from raysweep.results.lock import Holder, holder_of, launch_lock
from raysweep.results.mirror import lags, pull, push, pushing
from raysweep.results.reader import load_results, load_units, trial_states
from raysweep.results.remote import Remote
from raysweep.results.uris import MIRROR_FILE, is_uri, mirrored_uri, place_of, split_sweep, sweep_uri
from raysweep.results.writer import write_rows


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """No second to wait for others, nor between attempts."""
    monkeypatch.setattr(lock, "SETTLE_S", 0.0)
    monkeypatch.setattr(mirror, "PAUSES_S", (0.01, 0.01))
    monkeypatch.setattr(mirror, "PUSH_EVERY_S", 0.02)


@pytest.fixture
def there(tmp_path) -> Path:
    return tmp_path / "far away"


@pytest.fixture
def uri(there) -> str:
    return there.as_uri()


@pytest.fixture
def machine(tmp_path, uri, monkeypatch) -> Callable[[str], Path]:
    """machine("b"): from now on this is machine b; the folder of the sweep there."""

    def become(name: str) -> Path:
        monkeypatch.setenv("RAYSWEEP_CACHE", str(tmp_path / f"cache-{name}"))
        return storage_folder(uri) / "one"

    return become


def state_of(there: Path) -> set[str]:
    return {
        path.relative_to(there / "one").as_posix() for path in (there / "one").rglob("*") if path.is_file()
    }


def test_names_of_places(machine, uri, there):
    assert is_uri("s3://bucket")
    assert not any(map(is_uri, ("results", "/a/b", "./a:b", "c://", Path("a/b"))))
    folder = machine("a")
    assert mirrored_uri(folder.parent) == uri
    assert place_of(folder) == f"{uri}/one"
    assert folder.parent == storage_folder(uri + "/")
    assert place_of(there) == str(there)
    query = "s3://bucket/a/?endpoint_override=127.0.0.1:1&scheme=http"
    assert sweep_uri(query, "one") == "s3://bucket/a/one?endpoint_override=127.0.0.1:1&scheme=http"
    assert split_sweep(sweep_uri(query, "one")) == (query.replace("a/?", "a?"), "one")
    assert split_sweep("s3://bucket/one") == ("s3://bucket", "one")


def test_a_mirror_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("RAYSWEEP_CACHE", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="RAYSWEEP_CACHE"):
        storage_folder("s3://bucket")


def test_a_uri_that_was_made_a_path(machine):
    machine("a")
    with pytest.raises(UsageError, match=r"Path\(\)"):
        load_results("one", storage=Path("s3://bucket/prefix"))


def test_equal_uris_of_other_servers_are_other_storages(machine, monkeypatch):
    machine("a")
    first = storage_folder("s3://bucket/prefix")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert storage_folder("s3://bucket/prefix") != first
    assert first.name.startswith("s3-bucket-prefix-")


def test_a_password_lies_in_no_file(machine, tmp_path):
    machine("a")
    with pytest.raises(UsageError, match="password") as caught:
        storage_folder("s3://key:secret@bucket/prefix")
    assert "secret" not in str(caught.value)
    assert not any("bucket" in str(path) for path in tmp_path.rglob("*"))


@pytest.mark.parametrize(
    ("uri", "said"),
    [("s4://bucket/x", "s3://, gs://"), ("file://host/x", "hostname"), ("s3://", "Missing bucket")],
)
def test_storages_that_cannot_be(monkeypatch, tmp_path, uri, said):
    monkeypatch.setenv("RAYSWEEP_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match=said):
        load_results("one", storage=uri)


def test_a_uri_that_is_no_storage_makes_no_mirror(monkeypatch, tmp_path):
    monkeypatch.setenv("RAYSWEEP_CACHE", str(tmp_path))
    with pytest.raises(UsageError):
        storage_folder("s4://bucket/x")
    assert list(tmp_path.iterdir()) == []


def test_rows_reach_other_machines(machine, uri, there, trial_row, unit_rows):
    folder = machine("a")
    for number in range(3):
        write_rows(folder, trial_row(number), unit_rows(2), [])
    (folder / "unfinished").mkdir()
    (folder / "unfinished" / "x.safetensors").write_bytes(b"mine")
    (folder / "space.yaml").write_text("name: one\n")
    assert lags(folder)
    assert push(folder) == 7
    assert push(folder) == 0
    assert not lags(folder)
    expected, units = load_results(folder), load_units(folder)
    assert "unfinished/x.safetensors" not in state_of(there)
    other = machine("b")
    pd.testing.assert_frame_equal(load_results("one", storage=uri), expected)
    pd.testing.assert_frame_equal(load_units(f"{uri}/one"), units)
    assert other != folder
    assert list_sweeps(storage_folder(uri)) == ["one"]
    assert not lags(other)
    with pytest.raises(UsageError, match="no sweep 'two'") as caught:
        load_results("two", storage=uri)
    assert str(uri) in str(caught.value)


def test_only_what_is_new_is_copied(machine, trial_row, unit_rows, monkeypatch):
    folder = machine("a")
    write_rows(folder, trial_row(1), unit_rows(1), [])
    push(folder)
    other = machine("b")
    read, copied = Remote.read, []
    monkeypatch.setattr(Remote, "read", lambda self, name: copied.append(name) or read(self, name))
    pull(other)
    assert copied == [f"units/{1:016x}.parquet", f"trials/{1:016x}.parquet"]
    pull(other)
    assert len(copied) == 2
    time.sleep(1.1)  # moments of writing are known to the second
    write_rows(folder, trial_row(1, status="failed", error="x"), [], [])
    write_rows(folder, trial_row(2), unit_rows(1), [])
    push(folder)
    pull(other)
    assert len(copied) == 6
    assert trial_states(other) == {f"{1:016x}": "failed", f"{2:016x}": "finished"}


def test_units_arrive_before_their_trial(machine, trial_row, unit_rows, monkeypatch):
    folder = machine("a")
    write_rows(folder, trial_row(1), unit_rows(1), [])
    write, sent = Remote.write, []

    def failing(self, name, content):
        sent.append(name)
        if name.startswith("units/"):
            raise StorageError("gone")
        write(self, name, content)

    monkeypatch.setattr(Remote, "write", failing)
    with pytest.raises(StorageError):
        push(folder)
    assert sent == [f"units/{1:016x}.parquet"]


def test_what_a_killed_machine_has_not_pushed_is_not_lost(machine, trial_row, unit_rows):
    """It has a finished row, the other has run the trial again meanwhile and failed; of another it is the reverse."""
    folder = machine("a")
    write_rows(folder, trial_row(1, perplexity=1.0), unit_rows(1), [])
    write_rows(folder, trial_row(2, status="failed"), [], [])
    write_rows(folder, trial_row(3), unit_rows(2), [])
    other = machine("b")
    write_rows(other, trial_row(1, status="failed"), [], [])
    write_rows(other, trial_row(2), unit_rows(1), [])
    push(other)
    machine("a")
    pull(folder)
    push(folder)
    expected = {f"{n:016x}": "finished" for n in (1, 2, 3)}
    assert trial_states(folder) == expected
    machine("b")
    time.sleep(1.1)
    pull(other)
    assert trial_states(other) == expected
    assert len(load_units(other)) == 4


def test_what_is_removed_there_is_removed_here(machine, there, trial_row, unit_rows):
    folder = machine("a")
    for number in (1, 2):
        write_rows(folder, trial_row(number), unit_rows(1), [])
    push(folder)
    write_rows(folder, trial_row(3), unit_rows(1), [])  # not there yet, so not removed
    for part in ("trials", "units"):
        (there / "one" / part / f"{1:016x}.parquet").unlink()
    pull(folder)
    assert sorted(trial_states(folder)) == [f"{n:016x}" for n in (2, 3)]


def test_a_mirror_may_be_removed(machine, uri, trial_row, unit_rows):
    folder = machine("a")
    write_rows(folder, trial_row(1), unit_rows(1), [])
    push(folder)
    expected = load_results(folder)
    shutil.rmtree(folder.parent)
    pd.testing.assert_frame_equal(load_results("one", storage=uri), expected)


def test_clean_compacts_both_sides(machine, uri, there, trial_row, unit_rows):
    folder, other = machine("a"), machine("b")
    machine("a")
    for number in range(4):
        write_rows(folder, trial_row(number), unit_rows(2), [])
    push(folder)
    machine("b")
    pull(other)
    machine("a")
    write_rows(folder, trial_row(5), unit_rows(1), [])  # not pushed before
    expected, units = load_results(folder), load_units(folder)
    assert clean(sweep_folder("one", uri)).files == 10
    compacted = {f"{part}/0-compacted.parquet" for part in ("trials", "units")}
    assert state_of(there) == compacted
    machine("b")
    pd.testing.assert_frame_equal(load_results("one", storage=uri), expected)
    pd.testing.assert_frame_equal(load_units("one", storage=uri), units)
    assert {path.relative_to(other).as_posix() for path in other.rglob("*.parquet")} == compacted


def test_a_clean_that_is_killed_before_it_pushed(machine, uri, trial_row, unit_rows, monkeypatch):
    folder = machine("a")
    for number in range(3):
        write_rows(folder, trial_row(number), unit_rows(2), [])
    push(folder)
    expected = load_results(folder)
    with monkeypatch.context() as patch:
        patch.setattr("raysweep.results.cleaning.push_removal", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            clean(folder)
    pd.testing.assert_frame_equal(load_results("one", storage=uri), expected)
    clean(sweep_folder("one", uri))
    machine("b")
    pd.testing.assert_frame_equal(load_results("one", storage=uri), expected)


# The lock across machines


@pytest.fixture
def foreign(there) -> Callable[..., Path]:
    """foreign(seconds_ago): the lock of a process on another machine, which lived then."""

    def write(ago: float, host: str = "elsewhere", pid: int = 7) -> Path:
        path = there / "one" / lock.LOCK_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"host": host, "pid": pid, "token": "x"}))
        os.utime(path, (time.time() - ago,) * 2)
        return path

    return write


def test_one_launch_at_a_time_across_machines(machine, there, foreign):
    folder = machine("a")
    folder.mkdir()
    foreign(5)
    assert holder_of(folder) == Holder("elsewhere", 7)
    with pytest.raises(UsageError, match="as process 7 on elsewhere"), launch_lock(folder):
        pass
    foreign(lock.STALE_S + 5)
    assert holder_of(folder) is None
    with launch_lock(folder) as check:
        said = json.loads((there / "one" / lock.LOCK_FILE).read_text())
        assert (said["host"], said["pid"]) == (socket.gethostname(), os.getpid())
        check()
        other = machine("b")
        other.mkdir()
        with pytest.raises(UsageError, match=f"process {os.getpid()} on"), launch_lock(other):
            pass
    assert not (there / "one" / lock.LOCK_FILE).exists()


def test_a_killed_process_of_this_machine_holds_nothing(machine, foreign):
    folder = machine("a")
    folder.mkdir()
    foreign(1, socket.gethostname(), 2**22 + 1)
    assert holder_of(folder) is None
    with launch_lock(folder):
        pass


def test_it_beats_and_notices_who_took_over(machine, there, foreign, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    folder = machine("a")
    folder.mkdir()
    with launch_lock(folder) as check:
        path = there / "one" / lock.LOCK_FILE
        os.utime(path, (1, 1))
        wait_for(lambda: path.exists() and path.stat().st_mtime > 1)
        check()
        foreign(0)

        def noticed() -> bool:
            try:
                check()
            except StorageError as error:
                return "process 7 on elsewhere" in error.message
            return False

        wait_for(noticed)
    assert path.exists()  # it is not ours


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Pushing while a sweep runs


def test_rows_are_pushed_as_they_come(machine, there, trial_row, unit_rows):
    folder = machine("a")
    with pushing(folder, lambda: None) as check:
        write_rows(folder, trial_row(1), unit_rows(1), [])
        wait_for(lambda: (there / "one" / "trials" / f"{1:016x}.parquet").exists())
        write_rows(folder, trial_row(2), unit_rows(1), [])
        check()
    assert not lags(folder)


def test_a_push_is_tried_again(machine, trial_row, unit_rows, monkeypatch):
    folder, write, failures = machine("a"), Remote.write, [StorageError("a"), StorageError("b")]

    def failing(self, name, content):
        if failures:
            raise failures.pop()
        write(self, name, content)

    monkeypatch.setattr(Remote, "write", failing)
    with pushing(folder, lambda: None):
        write_rows(folder, trial_row(1), unit_rows(1), [])
    assert not failures
    assert not lags(folder)


def test_a_push_that_fails_again_and_again_ends_the_sweep(machine, trial_row, unit_rows, monkeypatch):
    folder = machine("a")
    monkeypatch.setattr(Remote, "write", lambda *_: (_ for _ in ()).throw(StorageError("no network")))

    def sweep() -> None:
        with pushing(folder, lambda: None) as check:
            write_rows(folder, trial_row(1), unit_rows(1), [])
            while True:
                check()
                time.sleep(0.01)

    with pytest.raises(StorageError, match=r"no network\n  All rows lie in"):
        sweep()
    with pytest.raises(ZeroDivisionError), pushing(folder, lambda: None):  # which is what ended it
        raise ZeroDivisionError
    monkeypatch.undo()
    assert lags(folder)


def test_the_record_is_shortened(machine, trial_row, unit_rows, monkeypatch):
    monkeypatch.setattr(sides, "SPARE_LINES", 10)
    folder = machine("a")
    for number in range(12):
        write_rows(folder, trial_row(1, perplexity=float(number)), unit_rows(1), [])
        push(folder)
    record = folder / sides.RECORD_FILE
    with open(record, "a") as stream:
        stream.write('["trials/cut o')
    assert len(record.read_text().splitlines()) == 25
    pull(folder)
    assert len(record.read_text().splitlines()) == 2
    assert not lags(folder)
    assert (folder.parent / MIRROR_FILE).exists()
