"""A correction of Triton's interpreter for bfloat16, and its quickening; used by the test suite and by nothing else.

TRITON_INTERPRET=1 runs a kernel's blocks in numpy, which has no bfloat16: the interpreter keeps such values
as bit patterns in uint16. In triton 3.6 to 3.9 it then gets wrong, without a word:

* casts from float32, and every store of a float32 value into bfloat16 memory, which is such a cast: they cut
  the low 16 bits off where hardware rounds to nearest even, so that a NaN may become an infinity. Casts of
  denormals lose their leading bit in either direction, and casts from integers and float64 store integers;
* ``tl.dot``, which multiplies the bit patterns as integers, and so do ``+``, ``*``, ``<`` and ``tl.fma``;
* ``tl.sum``, ``tl.cumsum`` and atomics, which add the bit patterns as integers.

bfloat16 is what users run, so :func:`install` replaces the five methods through which the first two go:
bfloat16 operands are widened to float32 (which is exact), the method runs on these, and a bfloat16 result is
rounded once, to nearest even. So does the hardware, in dots (products and sums in float32) and in single
operations. The third group depends on the order of its roundings and is refused: kernels sum in float32.

Loads, bitcasts, selections and data movement treat a value as bits and are right as they are.

The interpreter also replaces the whole of ``triton.language`` at each call of a device function, though the launch
around it has done so, makes a table of all dtypes each time it needs one, works out whether each sum and product of
integers overflows for an assertion that only debugging would make, and describes each value's shape in new objects:
half of the time of a test. :func:`install` lets the first replacement stand, keeps the answers and drops the
assertion.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

# The sources of these releases were read, and the correction's tests pass with them.
OLDEST, NEWEST = (3, 6), (3, 9)

# What is replaced, with the parameters that the replacements below rely on.
EXPECTED_PARAMETERS = {
    (interpreter.InterpreterBuilder, "cast_impl"): ["self", "src", "dst_type"],
    (interpreter.InterpreterBuilder, "unary_op"): ["self", "arg", "op"],
    (interpreter.InterpreterBuilder, "binary_op"): ["self", "lhs", "rhs", "op"],
    (interpreter.InterpreterBuilder, "create_fma"): ["self", "x", "y", "z"],
    (interpreter.InterpreterBuilder, "create_dot"): [
        "self",
        "a",
        "b",
        "d",
        "input_precision",
        "max_num_imprecise_acc",
    ],
    (interpreter.InterpreterBuilder, "create_atomic_rmw"): [
        "self",
        "rmwOp",
        "ptr",
        "val",
        "mask",
        "sem",
        "scope",
    ],
    (interpreter.ReduceOps, "sum"): ["self", "input"],
    (interpreter.ScanOps, "cumsum"): ["self", "input"],
    (interpreter.ScanOps, "cumprod"): ["self", "input"],
    (interpreter, "_patch_lang"): ["fn"],
    (interpreter, "_get_np_dtype"): ["tt_dtype"],
    (tl.tensor, "__init__"): ["self", "handle", "type"],
    (tl.block_type, "__init__"): ["self", "element_ty", "shape"],
    (tl.tuple, "__eq__"): ["self", "other"],
}

_originals: dict[tuple[Any, str], Any] = {}


def round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16, to nearest even; returns bit patterns (uint16). NaN stays NaN."""
    x = np.asarray(x, dtype=np.float32)
    bits = x.view(np.uint32)
    # Half a unit in the last place, less one where the kept part is even: a tie carries only into odd ones.
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
    quiet_nan = (bits >> 16) | 0x0040
    return np.where(np.isnan(x), quiet_nan, rounded).astype(np.uint16)


def widen_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Bit patterns of bfloat16 (uint16) as float32, exactly."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def _is_bfloat16(handle: object) -> bool:
    return isinstance(handle, interpreter.TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _widen(handle: Any) -> Any:
    if not _is_bfloat16(handle):
        return handle
    return interpreter.TensorHandle(widen_bfloat16(handle.data), tl.float32)


def _narrow(handle: Any) -> Any:
    return interpreter.TensorHandle(round_to_bfloat16(handle.data), tl.bfloat16)


def _corrected_cast(cast_impl: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(cast_impl)
    def corrected(self: Any, src: Any, dst_type: Any) -> Any:
        src = _widen(src)
        if dst_type.scalar == tl.bfloat16:
            return _narrow(cast_impl(self, src, tl.float32))
        return cast_impl(self, src, dst_type)

    return corrected


def _in_float32(method: Callable[..., Any]) -> Callable[..., Any]:
    """The builder's `method`, on bfloat16 operands widened; rounded back if its last operand was bfloat16."""

    @functools.wraps(method)
    def corrected(self: Any, *args: Any) -> Any:
        result = method(self, *map(_widen, args))
        last_operand = [arg for arg in args if isinstance(arg, interpreter.TensorHandle)][-1]
        # A comparison's data is bool whatever its operands were.
        if _is_bfloat16(last_operand) and result.data.dtype == np.float32:
            return _narrow(result)
        return result

    return corrected


def _refused(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def refusing(self: Any, *args: Any) -> Any:
        dtypes = [getattr(arg, "dtype", None) for arg in args]
        if any(getattr(dtype, "scalar", None) == tl.bfloat16 for dtype in dtypes):
            raise NotImplementedError(
                f"Triton's interpreter gets {method.__name__} of bfloat16 wrong: convert to float32 first, "
                "which keeps more of the sum's accuracy on a GPU too"
            )
        return method(self, *args)

    return refusing


def _get_bf16(self: Any, value: float) -> Any:
    """A bfloat16 constant; the interpreter has none before triton 3.9."""
    return _narrow(self.get_fp32(value))


def _patched_once(patch_lang: Callable[..., Any]) -> Callable[..., Any]:
    """`patch_lang`, which does nothing where `fn` finds the language patched: a scope that restores nothing."""

    @functools.cache
    def languages(fn: Callable[..., Any]) -> tuple[Any, ...]:
        return tuple(module for module in (tl, tl.core) if module in _modules(fn))

    @functools.wraps(patch_lang)
    def patched(fn: Any) -> Any:
        if any(tl.core.is_builtin(module.load) for module in languages(fn)):
            return patch_lang(fn)
        return interpreter._LangPatchScope()

    return patched


def _looked_up_once(get_np_dtype: Callable[..., Any]) -> Callable[..., Any]:
    of_scalar = functools.cache(get_np_dtype)

    @functools.wraps(get_np_dtype)
    def get(tt_dtype: Any) -> Any:
        scalar = tt_dtype.scalar
        # Pointer types can't be hashed.
        return get_np_dtype(scalar) if isinstance(scalar, tl.pointer_type) else of_scalar(scalar)

    return get


def _with_known_shape(init: Callable[..., None]) -> Callable[..., None]:
    """``tl.block_type.__init__``: what it makes of a shape is made once, and shared."""
    known: dict[tuple[int, ...], tuple[Any, Any, str]] = {}

    @functools.wraps(init)
    def __init__(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([getattr(size, "value", size) for size in shape])
        if sizes not in known:
            init(self, element_ty, shape)
            known[sizes] = self.shape, self.numel, str(self.shape)
        self.element_ty = element_ty
        self.shape, self.numel, text = known[sizes]
        self.name = f"<{text}, {element_ty}>"

    return __init__


def _of_known_shape(init: Callable[..., None]) -> Callable[..., None]:
    """``tl.tensor.__init__``, likewise."""

    @functools.cache
    def shared(sizes: tuple[int, ...]) -> tuple[Any, Any]:
        return tl.constexpr(math.prod(sizes)), tl.tuple([tl.constexpr(size) for size in sizes])

    @functools.wraps(init)
    def __init__(self: Any, handle: Any, type: Any) -> None:
        self.handle = handle
        self.type = type
        self.dtype = type.scalar
        self.numel, self.shape = shared(tuple(type.shape) if type.is_block() else ())

    return __init__


def _equal_if_same(equal: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(equal)
    def __eq__(self: Any, other: Any) -> Any:
        return tl.constexpr(True) if self is other else equal(self, other)

    return __eq__


def _modules(fn: Callable[..., Any]) -> list[Any]:
    return [value for value in fn.__globals__.values() if inspect.ismodule(value)]


def check_internals() -> None:
    """Raise RuntimeError unless this triton's interpreter is one that the correction was written for."""
    problems = []
    major, minor = (int(part) for part in re.findall(r"\d+", triton.__version__)[:2])
    if not OLDEST <= (major, minor) <= NEWEST:
        problems.append(f"triton is {triton.__version__}")
    for (owner, name), expected in EXPECTED_PARAMETERS.items():
        method = _originals.get((owner, name), getattr(owner, name, None))
        found = list(inspect.signature(method).parameters) if method is not None else "gone"
        if found != expected:
            problems.append(f"{owner.__name__}.{name} is {found}, not {expected}")
    if problems:
        raise RuntimeError(
            "tests/interpreter.py corrects bfloat16 in the interpreters of triton "
            f"{'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))}, but {'; '.join(problems)}. "
            "Read triton/runtime/interpreter.py of this release, then adapt the correction and its versions "
            "(or drop what has become needless), and run tests/test_interpreter.py."
        )


def install() -> None:
    """Correct the interpreter in this process; does nothing when that is done already."""
    if _originals:
        return
    check_internals()
    builder = interpreter.InterpreterBuilder
    for owner, name in EXPECTED_PARAMETERS:
        _originals[owner, name] = getattr(owner, name)
    _originals[builder, "get_bf16"] = getattr(builder, "get_bf16", None)
    for (owner, name), method in _originals.items():
        if name == "get_bf16":
            replacement = _get_bf16
        elif name == "_patch_lang":
            replacement = _patched_once(method)
        elif name == "_get_np_dtype":
            replacement = _looked_up_once(method)
        elif owner is tl.tensor:
            replacement = _of_known_shape(method)
        elif owner is tl.block_type:
            replacement = _with_known_shape(method)
        elif owner is tl.tuple:
            replacement = _equal_if_same(method)
        elif name == "cast_impl":
            replacement = _corrected_cast(method)
        elif owner is builder and name != "create_atomic_rmw":
            replacement = _in_float32(method)
        else:
            replacement = _refused(method)
        setattr(owner, name, replacement)
    _sanitize_overflow(False)


def _sanitize_overflow(on: bool) -> None:
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=on)


def uninstall() -> None:
    """Put the interpreter's own methods back."""
    for (owner, name), method in _originals.items():
        if method is None:
            delattr(owner, name)
        else:
            setattr(owner, name, method)
    _originals.clear()
    _sanitize_overflow(True)


@contextmanager
def uncorrected() -> Iterator[None]:
    """Triton's own behavior, to show what the correction is for."""
    uninstall()
    try:
        yield
    finally:
        install()
