"""Changes of a model that are all made or all undone, whatever interrupts them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

_MISSING = object()


class Changes:
    """A ``with`` block whose changes are undone, the last one first, if it ends with an error or Ctrl-C.

    How to undo a change is noted before it is made, and undoing what wasn't made does nothing. Ctrl-C while changes are
    being undone is held back until all are.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    def __enter__(self) -> Changes:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.undo()

    def make(self, change: Callable[[], object], undo: Callable[[], object]) -> None:
        """Make one change. ``undo`` must be harmless where it wasn't made, and more than once."""
        self._undo.append(undo)
        change()

    def item(self, items: dict[Any, Any], key: Any, value: Any) -> None:
        """Set or, with ``Changes.DELETED``, delete an item of a dict."""
        before = items.get(key, _MISSING)
        order = list(items)

        def undo() -> None:
            _put(items, key, before)
            if list(items) != order:  # as child modules are, in the order of their registration
                for name in order:
                    items[name] = items.pop(name)

        self.make(lambda: _put(items, key, value), undo)

    DELETED = _MISSING

    def module(self, model: nn.Module, name: str, module: nn.Module) -> None:
        """Put ``module`` in the place of the submodule ``name`` of ``model``."""
        parent, _, last = name.rpartition(".")
        self.item(model.get_submodule(parent)._modules, last, module)

    def undo(self) -> None:
        """Undo every change."""
        failures: list[BaseException] = []
        while self._undo:
            try:
                self._undo[-1]()
                self._undo.pop()
            except KeyboardInterrupt:  # the block has ended with an error already: this one is once more
                continue
            except Exception as error:
                self._undo.pop()
                failures.append(error)
        if failures:
            raise failures[0]


def _put(items: dict[Any, Any], key: Any, value: Any) -> None:
    if value is _MISSING:
        items.pop(key, None)
    else:
        items[key] = value
