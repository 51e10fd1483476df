"""pyaccel: a drop-in accelerated core for BERT-family Transformers.

    import pyaccel

    report = pyaccel.accelerate(model)      # a Hugging Face model, in place; needs the extra `hf`
    print(pyaccel.explain(model))           # which backend serves which op, and why
    print(pyaccel.verify.verify(stock, batch))  # is it right, on this model and machine
    pyaccel.restore(model)                  # the very same modules as before
    encoder = pyaccel.TextEncoder.from_pretrained("path/to/all-MiniLM-L6-v2")   # texts in, embeddings out

Everything is loaded on first use (PEP 562): `import pyaccel` imports none of torch, triton and transformers
and touches no device.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyaccel import dispatch, errors, hf, models, nn, ops, packing, quantization, reference, verify
    from pyaccel.dispatch import set_backend, use_backend
    from pyaccel.encode.encoder import TextEncoder
    from pyaccel.hf import accelerate, explain, restore

# The one place for the version: pyproject.toml reads it from here, so a checkout that is not installed, or
# that is newer than what is installed, says the right thing too.
__version__ = "0.1.0"

__all__ = [
    "TextEncoder",
    "__version__",
    "accelerate",
    "dispatch",
    "errors",
    "explain",
    "hf",
    "models",
    "nn",
    "ops",
    "packing",
    "quantization",
    "reference",
    "restore",
    "set_backend",
    "use_backend",
    "verify",
]

_SUBMODULES = (
    "dispatch",
    "errors",
    "hf",
    "models",
    "nn",
    "ops",
    "packing",
    "quantization",
    "reference",
    "verify",
)
_HOMES = {
    "TextEncoder": "pyaccel.encode.encoder",
    "accelerate": "pyaccel.hf",
    "explain": "pyaccel.hf",
    "restore": "pyaccel.hf",
    "set_backend": "pyaccel.dispatch",
    "use_backend": "pyaccel.dispatch",
}


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOMES:
        # An ImportError (no transformers) is for the user to see: it says which extra to install.
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
