"""Modules of the published sources of vLLM and SGLang, without all that these import.

What such a module imports of its engine is a name that may be called, subclassed, subscripted and asked for any attribute, and
nothing else: enough to define classes, and for what of them does not compute.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["load"]


class _Kind(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything

    def __getitem__(cls, item: Any) -> Any:
        return cls


class _Anything(metaclass=_Kind):
    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # As a decorator, it leaves what it is given as it is.
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _Anything(*args, **kwargs)

    def __bool__(self) -> bool:
        return False


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the named modules in their sources, and everything else beside them as nothing but names."""

    def __init__(self, sources: Path, real: Sequence[str]) -> None:
        self._sources, self._real = sources, real
        self._packages = {name.split(".")[0] for name in real} | {"triton", "sgl_kernel", "pydantic", "huggingface_hub"}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name in self._real:
            file = Path(self._sources, *name.split(".")).with_suffix(".py")
            return importlib.util.spec_from_file_location(name, file)
        if name.split(".")[0] in self._packages:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Any:
        module = types.ModuleType(spec.name)
        module.__path__ = []

        def missing(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return _Anything

        module.__getattr__ = missing  # type: ignore[method-assign]
        return module

    def exec_module(self, module: Any) -> None: ...


def load(sources: str, real: Sequence[str]) -> dict[str, Any]:
    """The named modules, and nothing of them, nor of what they import, in `sys.modules`."""
    finder, before = _Finder(Path(sources), real), dict(sys.modules)
    sys.meta_path.insert(0, finder)
    try:
        return {name: importlib.import_module(name) for name in real}
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] in finder._packages and name not in before]:
            del sys.modules[name]
