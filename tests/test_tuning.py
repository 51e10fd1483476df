"""Measured tables: what is nearest, whose comes first, what dispatch and `explain` make of it, and who writes them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from typer.testing import CliRunner

import pyaccel
from pyaccel import dispatch, ops, quantization, triton_support, tuning, tuning_tables
from pyaccel.benchmarks import tune
from pyaccel.benchmarks.case import Variant
from pyaccel.cli import app
from pyaccel.errors import UserInputError
from pyaccel.machine import kind
from pyaccel.ops.attention import matmul as products
from pyaccel.ops.linear import api as linear
from pyaccel.ops.linear import onednn
from tests.assertions import assert_equivalent
from tests.hf.models import batch_of, tiny

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No table but those that a test writes, and a machine whose kernels are not interpreted."""
    monkeypatch.setattr(tuning, "FOLDER", tmp_path / "shipped")
    monkeypatch.setenv("PYACCEL_TUNED", str(tmp_path / "own"))
    monkeypatch.setattr(triton_support, "interpreting", lambda: False)
    tuning.forget()
    yield tmp_path
    tuning.forget()


def write(
    folder: str, op: str, rows: dict[tuple[int, ...], dict[str, float]], machine: str | None = None
) -> None:
    root = tuning.FOLDER.parent
    listed = [{"size": list(size), "us": us} for size, us in rows.items()]
    table = {"machine": machine or kind(CPU), "dtype": "float32", "rows": listed}
    tuning.write(root / folder / f"{op}.json", [table])


INT8 = {
    (1, 32, 72): {"torch": 20.0, "floating": 10.0},
    (64, 32, 72): {"torch": 20.0, "triton": 30.0, "floating": 50.0},
}


def test_the_nearest_size_in_proportion() -> None:
    write("shipped", "int8_matmul", INT8)

    def near(rows: int, n_in: int = 32, n_out: int = 72, dtype: torch.dtype = torch.float32) -> int | None:
        found = tuning.nearest("int8_matmul", CPU, dtype, (rows, n_in, n_out))
        return None if found is None else found.size[0]

    assert [near(n) for n in (1, 7, 9, 100)] == [1, 1, 64, 64]
    assert near(64, 64, 144) == 64
    assert near(64, 32 * 5, 72 * 5) is None  # too far
    assert near(64, dtype=torch.bfloat16) is None
    assert near(0) is None
    _, many = tuning.timings("int8_matmul", CPU, torch.float32)
    assert (many.fastest(["triton", "torch"]), many.fastest(["triton", "floating"]), many.fastest(["sdpa"])) == (
        "torch", "triton", None
    )  # fmt: skip
    assert tuning.preferred("int8_matmul", CPU, torch.float32, (64, 32, 72), ("sdpa",)) == (None, "")


def by_products(length: int, *, training: bool = False, dropout_p: float = 0.0) -> bool:
    return products.serve(torch.zeros(length, 4, 8), length, training=training, dropout_p=dropout_p)[0]


def test_training_has_a_table_of_its_own() -> None:
    assert (by_products(128), by_products(128, training=True)) == (True, False)  # where nothing was measured
    write("own", "varlen_attention", {(128, 4, 8): {"matmul": 2.0, "sdpa": 1.0}})
    write("own", "varlen_attention_training", {(128, 4, 8): {"matmul": 1.0, "sdpa": 2.0}})
    assert (by_products(128), by_products(128, training=True)) == (False, True)
    assert [by_products(n, dropout_p=0.1) for n in (1024, 1025)] == [True, False]


def test_one_s_own_measurements_come_first_and_take_effect_at_once() -> None:
    def way() -> tuple[str | None, str]:
        return tuning.preferred("varlen_attention", CPU, torch.float32, (16, 4, 8), ("sdpa", "matmul"))

    assert way() == (None, "")
    assert not by_products(16)
    write("shipped", "varlen_attention", {(16, 4, 8): {"matmul": 2.0, "sdpa": 1.0}})
    assert way() == ("sdpa", "shipped at 16 x 4 x 8: sdpa 1, matmul 2 us")
    write("own", "varlen_attention", {(16, 4, 8): {"matmul": 1.0, "sdpa": 2.0}})
    assert way() == ("matmul", "measured here at 16 x 4 x 8: matmul 1, sdpa 2 us")
    assert by_products(16)
    assert not by_products(1025)  # its scores would be large
    with tuning.disabled():
        assert way() == (None, "")
    assert way()[0] == "matmul"
    write("own", "varlen_attention", {(16, 4, 8): {"matmul": 9.0, "sdpa": 2.0}}, machine="another")
    assert way()[0] == "matmul"


def test_a_new_process_reads_them() -> None:
    write("own", "varlen_attention", {(16, 4, 8): {"matmul": 1.0, "sdpa": 2.0}})
    code = (
        "import torch; from pyaccel.ops.attention.matmul import serve;"
        "print(serve(torch.zeros(16, 4, 8), 16, training=False, dropout_p=0.0)[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=dict(os.environ), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "True"


def test_where_the_folder_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PYACCEL_TUNED")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert tuning.user_folder() == tmp_path / "pyaccel" / "tuned"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert tuning.user_folder() == Path.home() / ".local" / "share" / "pyaccel" / "tuned"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"tables": [{"machine": 1}]}',
        '{"tables": [{"machine": "x", "dtype": "f"}]}',
        *(
            f'{{"tables": [{{"machine": "x", "dtype": "float32", "rows": {rows}}}]}}'
            for rows in (
                '[{"size": [0], "us": {"torch": 1}}]',
                '[{"size": [1], "us": {"torch": 0}}]',
                '[{"size": [1], "us": {}}]',
                '[{"size": [1], "us": {"torch": 1}}, {"size": [1, 2], "us": {"torch": 1}}]',
            )
        ),
    ],
)
def test_a_broken_table_says_so(text: str, folders: Path) -> None:
    (folders / "own").mkdir()
    (folders / "own" / "bias_gelu.json").write_text(text)
    with pytest.raises(ValueError, match=r"bias_gelu.json is not a valid tuning table: .*pyaccel tune"):
        tuning.read(folders / "own" / "bias_gelu.json")
    with pytest.warns(UserWarning, match=r"bias_gelu.json is not a valid tuning table"):
        assert tuning.timings("bias_gelu", CPU, torch.float32) == []


def test_shipped_tables_are_fine() -> None:
    files = sorted((Path(tuning.__file__).parent / "kernels" / "tuned").glob("*.json"))
    assert files
    assert all(tuning.read(file) for file in files)


def _table(**changes: Any) -> bytes:
    row = {"size": [16, 8, 32], "us": {"eager": 1.0, "onednn": 9.0}}
    table = {"machine": kind(CPU), "dtype": "float32", "rows": [row]}
    for name, value in changes.items():
        (row if name in ("size", "us", "config") else table)[name] = value
    return json.dumps({"tables": [table]}).encode()


DAMAGED = {
    "empty": b"",
    "cut short": _table()[:-9],
    "garbage": b"garbage{",
    "not UTF-8": b"\xff\xfe{}",
    "null": b"null",
    "a list": b"[1]",
    "a string": b'"tables"',
    "tables by name": b'{"tables": {"a": 1}}',
    "tables of numbers": b'{"tables": [1, 2]}',
    "no tables": b"{}",
    "nested too deep": b"[" * 100_000,
    "a number too long": b'{"tables": [{"machine": ' + b"9" * 5000 + b"}]}",
    "a newer format": b'{"format": 2, "tables": []}',
    "a machine that is a number": _table(machine=1),
    "no rows": _table(rows=None),
    "a row that is a number": _table(rows=[1]),
    "no such dtype": _table(dtype="float31"),
    "a dtype that is none": _table(dtype="nn"),
    "a dtype that is a number": _table(dtype=32),
    "NaN": _table(us={"eager": float("nan")}),
    "infinity": _table(us={"eager": float("inf")}),
    "negative": _table(us={"eager": -1.0, "onednn": 2.0}),
    "a time that is true": _table(us={"eager": True}),
    "a time that is text": _table(us={"eager": "1"}),
    "a time too large": _table(us={"eager": 10**400, "onednn": 1.0}),
    "times in a list": _table(us=[1.0]),
    "no times": _table(us={}),
    "a size too large": _table(size=[10**400, 8, 32]),
    "a size of zero": _table(size=[0, 8, 32]),
    "a size that is fractional": _table(size=[16.5, 8, 32]),
    "a size that is a number": _table(size=16),
    "no size": _table(size=[]),
    "too few sizes": _table(size=[16, 8]),
    "too many sizes": _table(size=[16, 8, 32, 1]),
    "implementations of another version": _table(us={"amx": 1.0}),
    "a configuration that is text": _table(config="fast"),
    "a configuration of texts": _table(config={"block_m": "64"}),
}


def _call() -> tuple[str, str]:
    """What decides which way serves, asked twice, as in two forwards."""
    x, weight = torch.randn(16, 8), torch.randn(32, 8)
    with torch.inference_mode():
        for _ in range(2):
            ops.linear_activation(x, weight)
    found = tuning.preferred("linear_activation", CPU, torch.float32, (16, 8, 32), ("eager", "onednn"))
    assert found == tuning.preferred(
        "linear_activation", CPU, torch.float32, (16, 8, 32), ("eager", "onednn")
    )
    return found


def _one_warning(matches: str) -> None:
    with pytest.warns(UserWarning, match=matches) as caught:
        assert _call() == (None, "")
    (warning,) = caught
    assert "without these measurements" in str(warning.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _call() == (None, "")


@pytest.fixture
def own(folders: Path) -> Path:
    (folders / "own").mkdir()
    return folders / "own" / "linear_activation.json"


def test_the_table_that_damage_is_done_to_is_used(own: Path) -> None:
    own.write_bytes(_table())
    assert _call()[0] == "eager"


@pytest.mark.parametrize("content", DAMAGED.values(), ids=list(DAMAGED))
def test_a_damaged_file_is_one_warning_and_the_default(own: Path, content: bytes) -> None:
    own.write_bytes(content)
    _one_warning("linear_activation")


@pytest.mark.parametrize("content", DAMAGED.values(), ids=list(DAMAGED))
def test_a_damaged_file_spoils_no_other(own: Path, content: bytes) -> None:
    own.write_bytes(_table())
    own.with_name("bias_gelu.json").write_bytes(content)
    own.with_name("zzz.json").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert _call()[0] == "eager"


def test_things_that_are_no_files(own: Path) -> None:
    own.mkdir()
    _one_warning("it isn't a file")
    own.rmdir()
    os.mkfifo(own)  # reading would wait for a writer
    tuning.forget()
    _one_warning("it isn't a file")


def test_a_huge_file_is_not_read(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own.write_bytes(_table())
    monkeypatch.setattr(tuning_tables, "MOST_BYTES", own.stat().st_size - 1)
    _one_warning("more than .* bytes")


def test_what_may_not_be_read(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own.write_bytes(_table())

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(tuning.Path, "read_bytes", refuse)
        _one_warning("Permission denied.*linear_activation")
    with monkeypatch.context() as patch:
        patch.setattr(tuning.Path, "iterdir", refuse)
        tuning.forget()
        _one_warning("Permission denied.*own")


@pytest.mark.parametrize("error", [RuntimeError("no home"), KeyError("uid"), OSError("no passwd")])
def test_no_home(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def no_home() -> Path:
        raise error

    monkeypatch.delenv("PYACCEL_TUNED")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setattr(tuning.Path, "home", no_home)
    _one_warning("no folder for measurements.*set PYACCEL_TUNED, XDG_DATA_HOME or HOME")
    done = CliRunner().invoke(app, ["tune", "int8_matmul", "--quick", "--device", "cpu"])
    assert isinstance(done.exception, UserInputError)
    assert "or pass --out" in str(done.exception)


def test_odd_environments(own: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own.write_bytes(_table())
    monkeypatch.setenv("PYACCEL_TUNED", str(own))  # a file
    tuning.forget()
    _one_warning("Not a directory")
    monkeypatch.chdir(own.parent.parent)
    monkeypatch.setenv("PYACCEL_TUNED", "own")
    tuning.forget()
    assert _call()[0] == "eager"
    monkeypatch.setenv("PYACCEL_TUNED", "")  # as if it weren't set
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert tuning.user_folder() == tmp_path / "data" / "pyaccel" / "tuned"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for missing in ("", str(tmp_path / "missing")):
            monkeypatch.setenv("PYACCEL_TUNED", missing)
            tuning.forget()
            assert _call() == (None, "")


def test_all_that_is_wrong_is_one_warning(own: Path) -> None:
    own.write_text("")
    own.with_name("bias_gelu.json").write_text("")
    _one_warning("bias_gelu.json is.*linear_activation.json is")


def test_warnings_that_are_errors_stop_one_call_alone(own: Path) -> None:
    own.write_text("")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="not a valid tuning table"):
            _call()
        assert _call() == (None, "")


def test_threads_read_the_files_once(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own.write_text("")
    reads, real = [], tuning.read
    monkeypatch.setattr(tuning, "read", lambda file: (reads.append(file), time.sleep(0.05), real(file))[-1])
    barrier = threading.Barrier(8)

    def work(_: int) -> Any:
        barrier.wait()
        return tuning.nearest("linear_activation", CPU, torch.float32, (16, 8, 32))

    with pytest.warns(UserWarning, match="valid tuning table") as caught, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [None] * 8
    assert len(reads) == len(caught) == 1


def test_trials_are_a_thread_s_own() -> None:
    x = torch.empty(1)

    def elsewhere() -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(lambda: tuning.launch("kernel", x, (1,), "default", exactly=True)).result()

    write("own", "varlen_attention", {(16, 4, 8): {"matmul": 1.0, "sdpa": 2.0}})
    with tuning.override_config("kernel", "tried"), tuning.disabled():
        assert tuning.launch("kernel", x, (1,), "default", exactly=True) == "tried"
        assert elsewhere() == "default"
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(tuning.nearest, "varlen_attention", CPU, torch.float32, (16, 4, 8)).result()
        assert found is not None, "what one thread ignores another uses"
        assert tuning.nearest("varlen_attention", CPU, torch.float32, (16, 4, 8)) is None
    assert tuning.launches_of("kernel", elsewhere) is None
    assert tuning.launches_of(
        "kernel", lambda: tuning.launch("kernel", x, (1,), "default", exactly=True)
    ) == (
        (1,),
        "default",
    )


def test_a_broken_file_makes_room_for_what_was_measured(own: Path) -> None:
    own.write_text("broken")
    with pytest.warns(
        UserWarning, match="now linear_activation.json.broken, and a new table takes its place"
    ):
        write("own", "linear_activation", {(16, 8, 32): {"eager": 1.0, "onednn": 9.0}})
    assert own.with_name("linear_activation.json.broken").read_text() == "broken"
    assert _call()[0] == "eager"
    own.unlink()
    own.with_name("linear_activation.json.broken").unlink()
    own.mkdir()
    with pytest.warns(UserWarning, match="it isn't a file"):
        write("own", "linear_activation", {(16, 8, 32): {"eager": 1.0, "onednn": 9.0}})
    assert _call()[0] == "eager"


def test_a_write_that_fails_leaves_nothing_behind(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own.write_bytes(_table())

    def full(self: Path, *_: object, **__: object) -> None:
        self.write_bytes(b"{")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tuning.Path, "write_text", full)
        with pytest.raises(OSError, match="No space left"):
            write("own", "linear_activation", {(16, 8, 32): {"eager": 9.0, "onednn": 1.0}})
    assert [file.name for file in own.parent.iterdir()] == [own.name]
    assert _call()[0] == "eager"


# ---- dispatch listens ----


def test_int8_by_the_row_that_decided() -> None:
    write("shipped", "int8_matmul", INT8)
    codes, scale = ops.quantize_per_token(torch.randn(50, 32))
    weight, w_scale = ops.quantize_per_channel(torch.randn(72, 32))
    with dispatch.record() as choices:
        ops.int8_matmul(codes, weight, scale, w_scale)
    row = "shipped at 64 x 32 x 72: torch 20, triton 30, floating 50 us"
    assert choices == [dispatch.Choice("int8_matmul", "torch", row)]


@pytest.mark.skipif(not onednn.supported_dtypes(), reason="this torch has no oneDNN")
def test_products_by_the_row_that_decided() -> None:
    x, weight, bias = torch.randn(50, 32), torch.randn(72, 32), torch.randn(72)

    def choice() -> tuple[str, str]:
        with torch.no_grad(), dispatch.record() as choices:
            way = linear.choose_way(x, weight, bias, "gelu")
        return way, choices[0].reason

    assert choice() == ("onednn", "oneDNN, bias and activation fused")
    write("own", "linear_activation", {(64, 32, 72): {"onednn": 2.0, "eager": 1.0}})
    row = "measured here at 64 x 32 x 72: eager 1, onednn 2 us"
    assert choice() == ("eager", f"F.linear, then the activation: {row}")
    write("own", "linear_activation", {(64, 32, 72): {"onednn": 1.02, "eager": 1.0}})
    assert choice()[0] == "onednn"  # that is noise
    write("own", "linear_activation", {(64, 32, 72): {"onednn": 1.0, "eager": 2.0}})
    assert choice() == (
        "onednn",
        "oneDNN, bias and activation fused (measured here at 64 x 32 x 72: onednn 1, eager 2 us)",
    )


@pytest.mark.parametrize(
    ("us", "expected"), [({"triton": 2.0, "torch": 1.0}, "torch"), ({"triton": 1.0, "torch": 2.0}, "triton")]
)
def test_on_a_card_the_faster_backend_serves(
    us: dict[str, float], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meta tensors stand for a card's: what would serve them is chosen, and nothing runs."""
    monkeypatch.setattr(tuning.machine, "kind", lambda device: "a card" if device.type == "meta" else "cpu")
    monkeypatch.setattr(triton_support, "has_triton", lambda: True)

    def x(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, device="meta")

    norm = (x(32), x(32))
    q = x(2, 4, 16, 8)
    packed, offsets = x(32, 4, 8), torch.empty(3, dtype=torch.int32, device="meta")
    ids = torch.empty(64, dtype=torch.int64, device="meta")
    calls: dict[str, tuple[tuple[int, ...], Callable[[], Any]]] = {
        "residual_layernorm": ((64, 32), lambda: ops.residual_layernorm(x(64, 32), x(64, 32), *norm)),
        "bias_gelu": ((64, 32), lambda: ops.bias_gelu(x(64, 32), x(32))),
        "bert_embeddings": ((64, 32), lambda: ops.bert_embeddings(ids, x(99, 32), None, None, *norm)),
        "scaled_dot_product_attention": ((16, 4, 8), lambda: ops.scaled_dot_product_attention(q, q, q)),
        "varlen_attention": (
            (16, 4, 8), lambda: ops.varlen_attention(packed, packed, packed, offsets, offsets, 16, 16)
        ),
        "linear_activation": ((64, 32, 72), lambda: ops.linear_activation(x(64, 32), x(72, 32), x(72), "gelu")),
    }  # fmt: skip
    for op, (size, call) in calls.items():
        write("own", op, {size: us}, machine="a card")
        with dispatch.record() as choices:
            call()
        first = next(choice for choice in choices if choice.op == op)
        assert first.backend == expected, op
        assert first.reason.startswith("measured here at "), op


def test_explain_shows_the_row() -> None:
    write("own", "varlen_attention", {(16, 4, 8): {"matmul": 1.0, "sdpa": 2.0}})
    write("own", "linear_activation", {(16, 32, 72): {"onednn": 1.0, "eager": 2.0}})
    model = tiny()
    pyaccel.accelerate(model)
    with torch.no_grad():
        model(**batch_of("right"))
    text = str(pyaccel.explain(model))
    assert "measured here at 16 x 4 x 8: matmul 1, sdpa 2 us" in text
    assert "measured here at 16 x 32 x 72: onednn 1, eager 2 us" in text


def test_explain_shows_when_int8_is_not_faster() -> None:
    write("shipped", "int8_matmul", INT8)
    model = tiny()
    quantization.quantize(model)
    with pyaccel.use_backend("torch"):
        pyaccel.accelerate(model)
        found = pyaccel.explain(model)
    assert found.int8["32 to 72"] == {1: 0.5, 64: 2.5}
    assert found.as_dict()["int8"]["32 to 72"] == {1: 0.5, 64: 2.5}
    assert "int8, 32 to 72: times as fast as floating point, by rows: 0.50 at 1, 2.50 at 64" in str(found)
    assert "not faster at 1 rows" in str(found)
    floating = tiny()
    pyaccel.accelerate(floating)
    assert pyaccel.explain(floating).int8 == {}


# ---- who writes them ----


def test_tune_writes_what_dispatch_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    smallest = [_smallest(one) for one in tune.tunables(CPU)]
    monkeypatch.setattr(tune, "tunables", lambda *_, **__: smallest)
    write("own", "int8_matmul", {(1, 2, 3): {"torch": 1.0}}, machine="another")
    options = ["tune", "--rounds", "2", "--dtype", "fp32", "--device", "cpu"]
    for _ in range(2):
        done = CliRunner().invoke(app, options)
        assert done.exit_code == 0, done.output
    assert f"written to {tuning.user_folder()}" in done.output
    files = {file.stem: tuning.read(file) for file in tuning.user_folder().glob("*.json")}
    assert files.keys() == {
        "linear_activation", "varlen_attention", "varlen_attention_training", "int8_matmul"
    }  # fmt: skip
    other, mine = files["int8_matmul"]
    assert other["machine"] == "another"
    assert {"machine", "dtype", "device", "torch", "triton", "commit", "date", "rows"} == mine.keys()
    assert (mine["machine"], mine["dtype"], mine["torch"]) == (
        kind(CPU),
        "float32",
        torch.__version__,
    )
    (row,) = mine["rows"]
    assert row["size"] == [19, 24, 40]
    assert row["us"].keys() == {"torch", "floating"}
    (timing,) = tuning.timings("varlen_attention", CPU, torch.float32)
    assert (timing.size, timing.us.keys()) == ((9, 2, 8), {"matmul", "sdpa"})
    (timing,) = tuning.timings("linear_activation", CPU, torch.float32)
    assert (timing.size, timing.us.keys()) == ((9, 24, 40), {"onednn", "eager"})


def _smallest(one: tune.Tunable) -> tune.Tunable:
    label, size = next(iter(one.case.smoke.items()))
    return tune.dataclasses.replace(one, sizes={label: size})


def test_a_wrong_way_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    (one,) = tune.tunables(CPU, ["varlen_attention"])
    wrong = Variant("pyaccel SDPA", lambda p: lambda: (p.tensors[0] * 2,))
    case = tune.dataclasses.replace(one.case, variants=(one.case.variants[0], wrong))
    broken = tune.dataclasses.replace(_smallest(one), case=case)
    monkeypatch.setattr(tune, "tunables", lambda *_, **__: [broken])
    done = CliRunner().invoke(app, ["tune", "--dtype", "fp32", "--device", "cpu"])
    assert done.exit_code == 1
    assert "pyaccel SDPA at 2x8 9: wrong" in done.output
    assert not tuning.user_folder().exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["bias_gelu"], "nothing is to be chosen for bias_gelu on cpu"),
        (["--dtype", "fp8"], "unknown dtype 'fp8'"),
        (["--device", "x"], "x"),
    ],
)
def test_bad_options(options: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["tune", *options])
    assert isinstance(done.exception, UserInputError)
    assert message in str(done.exception)


def test_every_op_of_a_card_has_something_to_measure() -> None:
    found = {one.name: one for one in tune.tunables(torch.device("cuda")) if isinstance(one, tune.Tunable)}
    assert found.keys() == {
        "scaled_dot_product_attention", "varlen_attention", "residual_layernorm", "bias_gelu", "bert_embeddings",
        "linear_activation",
        "masked_lm_cross_entropy", "int8_matmul",
    }  # fmt: skip
    for one in found.values():
        assert len({len(one.size(size)) for size in one.sizes.values()}) == 1
        names = {variant.name for variant in one.case.variants}
        assert {name for names in one.implementations.values() for name in names} <= names


def test_what_ships_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = Path(pyaccel.__file__).parent / "kernels" / "tuned"
    files = sorted(shipped.glob("*.json"))
    assert [file.stem for file in files] == [
        "int8_matmul", "linear_activation", "varlen_attention", "varlen_attention_training"
    ]  # fmt: skip
    for file in files:
        for table in tuning.read(file):
            assert {"machine", "dtype", "device", "torch", "commit", "date", "rows"} <= table.keys()
            assert len({len(row["size"]) for row in table["rows"]}) == 1
            assert all(us > 0 for row in table["rows"] for us in row["us"].values())
    assert json.loads(files[0].read_text()).keys() == {"tables"}


def test_what_was_measured_before_does_not_decide_what_is_measured_now() -> None:
    """Else a way that lost once would be measured as the one that won, for ever."""
    write("own", "varlen_attention", {(9, 2, 8): {"matmul": 9.0, "sdpa": 1.0}})
    (one,) = tune.tunables(CPU, ["varlen_attention"])
    known: list[Any] = []

    def asking(variant: Variant) -> Variant:
        def prepare(p: Any) -> Any:
            known.append(tuning.timings("varlen_attention", CPU, torch.float32))
            return variant.prepare(p)

        return tune.dataclasses.replace(variant, prepare=prepare)

    case = tune.dataclasses.replace(one.case, variants=tuple(map(asking, one.case.variants)))
    tune.dataclasses.replace(_smallest(one), case=case).table(torch.float32, CPU, 1)
    assert known == [[], []]
    assert len(tuning.timings("varlen_attention", CPU, torch.float32)) == 1


def test_a_size_that_is_a_symbol_is_no_size() -> None:
    """Of a graph traced for all sizes, where nothing can be looked up."""
    write("own", "linear_activation", {(64, 32, 72): {"onednn": 2.0, "eager": 1.0}})
    weight, bias = torch.randn(72, 32), torch.randn(72)
    traced = make_fx(lambda *given: ops.linear_activation(*given, "gelu"), tracing_mode="symbolic")
    with torch.no_grad():
        graph = traced(torch.randn(7, 32), weight, bias)
        x = torch.randn(9, 32)
        plain = torch.nn.functional.gelu(torch.nn.functional.linear(x, weight, bias))
        assert_equivalent(graph(x, weight, bias), plain)


def test_a_product_in_two_steps_says_so() -> None:
    write("own", "linear_activation", {(64, 32, 72): {"onednn": 2.0, "eager": 1.0}})
    x, weight, bias, residual = torch.randn(50, 32), torch.randn(72, 32), torch.randn(72), torch.randn(50, 72)
    with torch.no_grad(), dispatch.record() as choices:
        out = ops.linear_residual_layernorm(x, weight, bias, residual, torch.ones(72), torch.zeros(72))
    if onednn.supported_dtypes():
        row = "measured here at 64 x 32 x 72: eager 1, onednn 2 us"
        assert choices[0].reason == f"on the CPU; the product in F.linear, {row}"
    total = torch.nn.functional.linear(x, weight, bias) + residual
    assert_equivalent(out, torch.nn.functional.layer_norm(total, (72,), eps=1e-12))
