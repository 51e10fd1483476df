"""Text i is line or row i, whatever the file holds; what is no text is an error that names the line."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pyaccel.encode.texts import Texts, read_lines, read_texts
from pyaccel.errors import UserInputError

ODD = "a\rb\x0bc\x0cd\x1ce\x85f\u2028g\u2029h"  # str.splitlines would make nine of it


def texts_of(folder: Path, name: str, data: bytes | str) -> list[str]:
    file = folder / name
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    return list(read_texts(file, "text"))


@pytest.mark.parametrize(
    ("data", "texts"),
    [
        (b"a\nb\n", ["a", "b"]),
        (b"a\nb", ["a", "b"]),
        (b"a\r\nb\r\n", ["a", "b"]),
        (b"a\r\r\nb\r", ["a\r", "b\r"]),
        (b"\n\na\n\n", ["", "", "a", ""]),
        (b" a \n\t\n", [" a ", "\t"]),
        (f"{ODD}\n{ODD}\n".encode(), [ODD, ODD]),
        (b"\xef\xbb\xbfa\n\xef\xbb\xbfb\n", ["a", "\ufeffb"]),
        (b"", []),
        (b"\xef\xbb\xbf", [""]),
    ],
)
@pytest.mark.parametrize("name", ["t.txt", "t", "t.TEXT"])
def test_lines(tmp_path: Path, name: str, data: bytes, texts: list[str]) -> None:
    assert texts_of(tmp_path, name, data) == texts


@pytest.mark.parametrize("name", ["t.jsonl", "t.JSONL", "t.ndjson", "t.json"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_of_json(tmp_path: Path, name: str, end: str) -> None:
    texts = [ODD, "", "ü\0", '"', "\U0001f600"]
    lines = end.join(json.dumps({"n": i, "text": text}) for i, text in enumerate(texts))
    assert texts_of(tmp_path, name, "\ufeff" + lines) == texts
    assert texts_of(tmp_path, name, json.dumps({"text": "raw \u2028"}, ensure_ascii=False)) == ["raw \u2028"]


@pytest.mark.parametrize("name", ["t.json", "t.JSON"])
def test_an_array_of_json(tmp_path: Path, name: str) -> None:
    values = ["a", {"text": "b"}, "", {"text": ODD, "n": 1}]
    for indent in (None, 2):
        assert texts_of(tmp_path, name, "\ufeff\n " + json.dumps(values, indent=indent)) == [
            "a",
            "b",
            "",
            ODD,
        ]
    assert texts_of(tmp_path, name, "[]") == []


@pytest.mark.parametrize(
    ("name", "delimiter"), [("t.csv", ","), ("t.CSV", ","), ("t.tsv", "\t"), ("t.Tsv", "\t")]
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_rows(tmp_path: Path, name: str, delimiter: str, end: str) -> None:
    texts = [ODD, "", 'say "hi"', "two\nlines", "a,b\tc", "x" * 200_000, "\n", "ü"]
    file = tmp_path / name
    with file.open("w", newline="", encoding="utf-8-sig") as target:
        writer = csv.writer(target, delimiter=delimiter, lineterminator=end)
        writer.writerow(["n", "text"])
        writer.writerows(enumerate(texts))
    before = csv.field_size_limit()
    assert list(read_texts(file, "text")) == texts
    assert csv.field_size_limit() == before


def test_an_empty_line_is_a_row_of_one_column(tmp_path: Path) -> None:
    assert texts_of(tmp_path, "t.csv", 'text\na\n\n""\nb') == ["a", "", "", "b"]
    assert texts_of(tmp_path, "t.csv", "text\n") == []
    assert texts_of(tmp_path, "t.csv", 'n,text\n1,5" disk\n') == ['5" disk']
    assert texts_of(tmp_path, "t.csv", 'text\na\rb\r\r\n"c\rd"\n\r') == ["a\rb\r", "c\rd", "\r"]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("t.txt", b"a\nb\xff\n", "line 2: not UTF-8 text (invalid start byte at byte 1"),
        ("t.txt", b"a\n\xc3", "line 2: not UTF-8 text (unexpected end of data"),
        ("t.txt", b"\xed\xa0\x80\n", "line 1: not UTF-8"),
        ("t.txt", "a\n".encode("utf-16"), "is UTF-16, not UTF-8 text"),
        ("t.txt", "\ufeffa\n".encode("utf-16-be"), "is UTF-16, not UTF-8 text"),
        ("t.txt", b"a\nb\0c\n", "line 2: a NUL byte"),
        ("t.csv", b"text\nb\0c\n", "line 2: a NUL byte"),
        ("t.txt.gz", b"\x1f\x8b", "is compressed"),
        ("t.jsonl.ZST", b"", "is compressed"),
        ("t.jsonl", '{"text": "a"}\n\n', "line 2: not a JSON object with 'text' in it"),
        ("t.jsonl", '{"text": "a"', "line 1: not a JSON object"),
        ("t.jsonl", '["text"]', "line 1: not a JSON object"),
        ("t.jsonl", '{"texts": "a"}', "line 1: not a JSON object with 'text' in it"),
        ("t.jsonl", '{"text": null}', "line 1: 'text' is a NoneType, not a text"),
        ("t.jsonl", '{"text": 1}', "line 1: 'text' is a int, not a text"),
        ("t.jsonl", '{"text": ["a"]}', "line 1: 'text' is a list, not a text"),
        ("t.jsonl", '{"text": "a"}\n{"text": "\\ud800"}', "line 2: 'text' holds half of a surrogate pair"),
        ("t.jsonl", "[" * 100_000, "line 1: not a JSON object"),
        ("t.jsonl", '{"text": ' + "9" * 10_000 + "}", "line 1: "),
        ("t.json", '[{"text": "a"}, 1]', "item 2: not a JSON object with 'text' in it"),
        ("t.json", '["a", "\\udfff"]', "item 2: 'text' holds half of a surrogate pair"),
        ("t.json", '["a", ', "is not valid JSON"),
        ("t.csv", 'text\na\n"b\nc\n', "the row that begins in line 3 can't be read"),
        ("t.csv", 'text\n"a" b\n', "the row that begins in line 2 can't be read"),
        ("t.tsv", 'n\ttext\n1\t"a\n2\tb\n', "the row that begins in line 2 can't be read"),
        ("t.csv", "n,text\n1,a\n2,b,c\n", "line 3: 3 fields, but the header has 2"),
        ("t.csv", "n,text\n1\n", "line 2: 1 fields, but the header has 2"),
        ("t.csv", 'n,text\n1,"a\nb"\n\n', "line 4: 0 fields, but the header has 2"),
        ("t.csv", "n,texts\n1,a\n", "has no column 'text' but n, texts"),
        ("t.csv", "text,text\n1,a\n", "has more than one column 'text'"),
        ("t.csv", "", "has no column 'text' but none"),
    ],
)  # fmt: skip
def test_what_is_no_text_is_named(tmp_path: Path, name: str, data: bytes | str, words: str) -> None:
    with pytest.raises(UserInputError) as caught:
        texts_of(tmp_path, name, data)
    assert words in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for read in (lambda file: read_texts(file, "text"), read_lines, lambda file: Texts(file, "text", 4)):
        with pytest.raises(UserInputError, match="there is no file"):
            read(tmp_path / "none.txt")
        for name in (".", "pipe"):
            with pytest.raises(UserInputError, match="not a regular file"):
                read(tmp_path / name)


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "t.PARQUET"

    def read(column: str = "text", **columns: object) -> list[str]:
        table = arrow.table(list(columns.values()), names=[name.replace("_", ".") for name in columns])
        parquet.write_table(table, file, row_group_size=2)
        return list(read_texts(file, column))

    texts = [ODD, "", "a\0b", "ü"]
    assert read(text=arrow.array(texts)) == texts
    assert read(text=arrow.array(texts, arrow.large_string())) == texts
    assert read(text=arrow.array(texts).dictionary_encode()) == texts
    assert read("a.b", a_b=arrow.array(texts), a=arrow.array([{"b": "inner"}] * 4)) == texts
    for words, column in (
        ("row 3: 'text' is null", arrow.array(["a", "b", None])),
        ("'text' is a column of struct", arrow.array([{"text": "a"}])),
        ("'text' is a column of list", arrow.array([["a"]])),
        ("'text' is a column of binary", arrow.array([b"a"])),
        ("'text' is a column of int64", arrow.array([1])),
        ("'text' is a column of null", arrow.array([None])),
    ):
        with pytest.raises(UserInputError, match=words):
            read(text=column)
    with pytest.raises(UserInputError, match="has no column 'body' but text"):
        read("body", text=arrow.array(texts))
    parquet.write_table(arrow.table({"text": texts * 1000}), file)
    whole = file.read_bytes()
    middle = len(whole) // 3
    for damaged in (
        b"",
        b"PAR1",
        whole[:-1],
        whole[: len(whole) // 2],
        whole[:middle] + bytes(99) + whole[middle + 99 :],
    ):
        file.write_bytes(damaged)
        try:
            assert list(read_texts(file, "text")) == texts * 1000
        except UserInputError as error:
            assert "can't be read as parquet" in str(error)  # noqa: PT017


# --- twice ---


def grown(file: Path) -> None:
    with file.open("a") as target:
        target.write("more\n")


def rewritten(file: Path) -> None:
    file.write_text(file.read_text().replace("text 5", "TEXT 5"))


def in_its_old_time(change: Callable[[Path], None]) -> Callable[[Path], None]:
    def changed(file: Path) -> None:
        before = file.stat()
        change(file)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    return changed


def replaced(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(file.read_bytes())
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    other.replace(file)


CHANGES: dict[str, Callable[[Path], None]] = {
    "shrunk": lambda file: file.write_text("text 0\n"),
    "emptied": lambda file: file.write_text(""),
    "grown": grown,
    "rewritten": rewritten,
    "rewritten in its old time": in_its_old_time(rewritten),
    "touched": lambda file: os.utime(file, ns=(1, 1)),
    "replaced": replaced,
    "deleted": lambda file: file.unlink(),
    "made a folder": lambda file: (file.unlink(), file.mkdir())[0],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("after", [0, 4, 10], ids=lambda n: f"after {n}")
def test_a_change_is_noticed_before_a_text_is_used(
    tmp_path: Path, change: Callable[[Path], None], after: int
) -> None:
    file = tmp_path / "t.txt"
    texts = [f"text {i}" for i in range(10)]
    file.write_text("\n".join(texts) + "\n")
    source = Texts(file, "text", 4)
    assert (source.count, list(source)) == (10, texts)
    read: list[str] = []

    def run() -> None:
        if not after:
            change(file)
        for text in source:
            read.append(text)
            if len(read) == after:
                change(file)
        source.check()

    # What was read of the file before it changed stays true: the same bytes in a buffer are not a change.
    if change is CHANGES["rewritten in its old time"] and after:
        return
    with pytest.raises(
        UserInputError, match=r"was changed while it was read|is gone|not a regular file|there is no file"
    ):
        run()
    assert read == texts[: len(read)]


def test_the_same_texts_have_the_same_digest_in_any_file(tmp_path: Path) -> None:
    files = {
        "a.txt": "a\nb\n",
        "b.txt": "a\r\nb",
        "a.jsonl": '{"text": "a"}\n{"text": "b"}',
        "a.csv": "text\na\nb\n",
    }
    for name, data in files.items():
        (tmp_path / name).write_text(data)
    assert len({Texts(tmp_path / name, "text", 4).digest for name in files}) == 1
    for other in ("ab\n", "a\nb\n\n", "b\na\n", "a\n", "ab\n\n"):
        (tmp_path / "c.txt").write_text(other)
        assert Texts(tmp_path / "c.txt", "text", 4).digest != Texts(tmp_path / "a.txt", "text", 4).digest
