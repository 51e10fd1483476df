"""``python -m tests.gpu_stub FOLDER``: run every check on the stub card, and print a JSON object check -> error.

``python -m tests.gpu_stub FOLDER host-calls`` and ``host-time`` print what host.py measures.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import traceback
from pathlib import Path

from tests.gpu_stub.build import build


def main(folder: Path, wanted: list[str]) -> None:
    # Read by Triton: where its driver finds libcuda.so.1.
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    os.environ.pop("TRITON_INTERPRET", None)
    library = ctypes.CDLL(str(build(folder)), mode=ctypes.RTLD_GLOBAL)
    from tests.gpu_stub import card

    if wanted == ["host-time"]:
        card.pretend(library)
        from tests.gpu_stub import host

        host.report(host.timed(), "us")
        return
    card.insert(library)
    if wanted == ["host-calls"]:
        from tests.gpu_stub import host

        host.report(host.counted(), "calls")
        return
    from tests.gpu_stub.checks import CHECKS

    errors: dict[str, str] = {}
    for name, check in CHECKS.items():
        if wanted and name not in wanted:
            continue
        try:
            check()
            errors[name] = ""
        except Exception:
            errors[name] = traceback.format_exc()
    print(json.dumps(errors))


main(Path(sys.argv[1]), sys.argv[2:])
