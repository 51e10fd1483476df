"""What is on disk of a job is believed only where it is this job's, whole and unchanged."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyaccel.encode import files as encode_files
from pyaccel.encode import job as encode_job
from pyaccel.encode.identity import Identity, Shard
from pyaccel.encode.job import Job
from pyaccel.errors import UserInputError

LINES = [f"text {i}" for i in range(10)]
SETTINGS = {"pooling": "mean", "threads": 2}


def job_of(out: Path, shard: Shard | None = None, overwrite: bool = False, **changes: Any) -> Job:
    identity = {
        "texts": "digest",
        "column": "text",
        "model": "m",
        "settings": SETTINGS,
        "window": 4,
        **changes,
    }
    return Job(out, len(LINES), Identity(**identity), shard or Shard(), overwrite=overwrite)


def encode(job: Job, *, parts: int = 3) -> list[int]:
    """Which windows had to be computed."""
    done = []
    for index, window in job.todo(iter(LINES)):
        if len(done) < parts:
            job.save(index, np.array([[float(text.split()[1]), 1.0] for text in window], np.float32))
            done.append(index)
    return done


EXPECTED = np.array([[float(i), 1.0] for i in range(10)], np.float32)


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def of_numpy(file: Path) -> None:
    np.save(file, np.zeros((4, 2), np.float32))


def of_pickle(file: Path) -> None:
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "emptied": lambda file: file.write_bytes(b""),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "cut in the middle": lambda file: file.write_bytes(file.read_bytes()[:150]),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "one bit": flipped,
    "zeros": lambda file: file.write_bytes(bytes(len(file.read_bytes()))),
    "another part of the job": lambda file: shutil.copy(file.with_name("00000000.npy"), file),
    "from numpy": of_numpy,
    "from pickle": of_pickle,
    "removed": lambda file: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_part_is_computed_again(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    out = tmp_path / "o.npy"
    job = job_of(out)
    assert encode(job) == [0, 1, 2]
    damage(job.folder / "00000001.npy")
    again = job_of(out)
    assert again.texts_todo() == 4
    assert encode(again) == [1]
    again.finish()
    assert np.array_equal(np.load(out, allow_pickle=False), EXPECTED)


@pytest.mark.parametrize("damage", [d for n, d in DAMAGES.items() if n != "removed"], ids=lambda d: "")
@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_a_part_that_is_damaged_before_the_end_is_not_written(
    tmp_path: Path, damage: Callable[[Path], object], suffix: str
) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    out = tmp_path / f"o{suffix}"
    job = job_of(out)
    encode(job)
    damage(job.folder / "00000001.npy")
    with pytest.raises(UserInputError, match=r"00000001\.npy was damaged, and is removed: start again"):
        job.finish()
    assert not out.exists()
    assert not list(job.folder.glob("whole*"))
    again = job_of(out)
    assert encode(again) == [1]
    again.finish()
    assert out.exists()


def test_a_part_of_another_job_is_computed_again(tmp_path: Path) -> None:
    other = job_of(tmp_path / "other.npy", model="another")
    encode(other)
    job = job_of(tmp_path / "o.npy")
    encode(job, parts=1)
    shutil.copy(other.folder / "00000002.npy", job.folder)
    assert encode(job_of(tmp_path / "o.npy")) == [1, 2]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"texts": "grown"}, "parts made from other texts:"),
        ({"model": "n"}, "parts made from other model:"),
        ({"column": "body"}, "other column (text, now body)"),
        ({"window": 5}, "other window (4, now 5)"),
        ({"settings": {**SETTINGS, "threads": 8}}, "other settings (threads 2, now 8)"),
        ({"settings": {**SETTINGS, "torch": "3"}}, "other settings (torch None, now 3)"),
    ],
)
def test_another_job_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    out = tmp_path / "o.npy"
    encode(job_of(out), parts=1)
    with pytest.raises(UserInputError) as caught:
        job_of(out, **changes)
    assert words in str(caught.value)
    assert "--overwrite" in str(caught.value)
    job = job_of(out)
    assert encode(job) == [1, 2]
    job.finish()
    with pytest.raises(UserInputError, match="exists already, made from other"):
        job_of(out, **changes)
    assert encode(job_of(out, overwrite=True, **changes))


def test_a_finished_job_knows_that_it_is(tmp_path: Path) -> None:
    out = tmp_path / "o.npy"
    job = job_of(out)
    encode(job)
    job.finish()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["o.npy", "o.npy.job.json"]
    again = job_of(out)
    assert again.finished_before
    assert not encode(again)
    again.finish()
    for change in (flipped, lambda file: file.write_bytes(b""), of_numpy):
        kept = out.read_bytes()
        change(out)
        with pytest.raises(UserInputError, match="was changed after it was finished"):
            job_of(out)
        out.write_bytes(kept)
    (tmp_path / "o.npy.job.json").write_text("{")
    with pytest.raises(UserInputError, match="is damaged: start over with --overwrite"):
        job_of(out)
    (tmp_path / "o.npy.job.json").unlink()
    with pytest.raises(UserInputError, match="exists already: give another file"):
        job_of(out)
    out.unlink()
    assert encode(job_of(out)) == [0, 1, 2]


def test_an_output_that_is_made_again_is_there_until_it_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "o.npy"
    out.write_bytes(b"precious")
    job = job_of(out, overwrite=True)
    encode(job, parts=2)
    assert out.read_bytes() == b"precious"
    again = job_of(out)
    assert encode(again) == [2]
    again.finish()
    assert np.array_equal(np.load(out), EXPECTED)


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '{"texts": 1}'])
def test_a_damaged_job_file_is_named(tmp_path: Path, content: str) -> None:
    job = job_of(tmp_path / "o.npy")
    (job.folder / "job.json").write_text(content)
    with pytest.raises(UserInputError, match="--overwrite"):
        job_of(tmp_path / "o.npy")


@pytest.mark.parametrize("name", ["o.npy.parts", "o.npy.parts.finished"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_the_user_is_not_removed(tmp_path: Path, name: str, overwrite: bool) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.tex").write_text("years")
    with pytest.raises(UserInputError, match=r"holds thesis\.tex, which is no part of a job"):
        job_of(tmp_path / "o.npy", overwrite=overwrite)
    assert (tmp_path / name / "thesis.tex").read_text() == "years"


# --- a full disk ---


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_a_full_disk_leaves_nothing_half_and_can_be_resumed(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each fsync and rename in turn."""
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    whole = tmp_path / f"whole{suffix}"
    job = job_of(whole)
    encode(job)
    job.finish(iter(LINES) if suffix == ".parquet" else None)
    failures = 0
    for name in ("fsync", "replace"):
        real = getattr(encode_files.os, name)
        for failing in range(100):
            out = tmp_path / f"{name}{failing}{suffix}"
            calls = iter(range(1000))

            def full(*args: Any, real: Any = real, calls: Any = calls, failing: int = failing) -> Any:
                if next(calls) == failing:
                    raise OSError(errno.ENOSPC, "No space left on device", str(args[0]))
                return real(*args)

            with monkeypatch.context() as patch:
                patch.setattr(encode_files.os, name, full)
                try:
                    job = job_of(out)
                    encode(job)
                    job.finish(iter(LINES) if suffix == ".parquet" else None)
                    break
                except (UserInputError, OSError) as error:
                    assert "No space left on device" in str(error)  # noqa: PT017
            failures += 1
            assert not [f for f in tmp_path.rglob("*") if f.suffix[1:].isdigit() and f.stem != "lock"]
            job = job_of(out)
            encode(job)
            job.finish(iter(LINES) if suffix == ".parquet" else None)
            assert out.read_bytes() == whole.read_bytes()
    assert failures > 12


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(tmp_path / "o.npy")

    def full(target: Any, *rest: Any) -> None:
        target.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    encode(job)
    monkeypatch.setattr(encode_job, "_write_header", full)
    with pytest.raises(
        UserInputError, match=r"could not be written \(No space left on device\): what is done so far"
    ):
        job.finish()
    assert not list(job.folder.glob("whole*"))


# --- several processes ---


def test_a_process_that_sees_another_file_says_so(tmp_path: Path) -> None:
    encode(job_of(tmp_path / "o.npy", Shard(0, 2)))
    with pytest.raises(UserInputError, match="process 1 would add to parts that were made from other texts"):
        job_of(tmp_path / "o.npy", Shard(1, 2), texts="another file's")


def test_waiting_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_job, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(UserInputError, match="for the first process"):
        job_of(tmp_path / "o.npy", Shard(1, 2))
    first = job_of(tmp_path / "o.npy", Shard(0, 2))
    assert encode(first) == [0, 2]
    with pytest.raises(UserInputError, match="for the other processes' parts"):
        first.finish()
    second = job_of(tmp_path / "o.npy", Shard(1, 2))
    assert encode(second) == [1]
    second.finish()
    first.finish()
    assert np.array_equal(np.load(tmp_path / "o.npy"), EXPECTED)


@pytest.mark.parametrize(
    "given",
    [
        {"RANK": "a"},
        {"RANK": "1"},
        {"RANK": "-1", "WORLD_SIZE": "2"},
        {"WORLD_SIZE": "0"},
        {"LOCAL_RANK": "x"},
    ],
)
def test_a_share_that_is_none(given: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserInputError, match="RANK"):
        Shard.from_environment()


def test_fewer_texts_than_were_counted_are_an_error(tmp_path: Path) -> None:
    job = job_of(tmp_path / "o.npy")
    with pytest.raises(UserInputError, match="there are 6 texts where 10 were counted"):
        list(job.todo(iter(LINES[:6])))
    with pytest.raises(ValueError, match="must have 4 rows"):
        job.save(0, np.zeros((3, 2), np.float32))


def test_the_job_file_can_be_read_by_people(tmp_path: Path) -> None:
    job = job_of(tmp_path / "o.npy")
    there = json.loads((job.folder / "job.json").read_text())
    assert there["settings"] == SETTINGS
    assert there["count"] == 10
