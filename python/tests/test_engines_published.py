"""Names in `fake_engines.py` beside those of the published packages, where `TOKENSELECT_ENGINE_SOURCES` names a folder with these."""

# ruff: noqa: E402 (what is missing is said before it is imported)

from __future__ import annotations

import ast
import dataclasses
import inspect
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip(
    "torch", reason="PyTorch is missing: nothing of tokenselect.vllm and tokenselect.sglang is tested"
)
tokenselect = pytest.importorskip("tokenselect", reason="tokenselect is missing")

from engines_runners import engines
from engines_vllm import LAYOUTS

import fake_engines as fakes

__all__ = ["engines"]  # fixtures are found by name


published = pytest.mark.skipif(
    fakes.SOURCES is None, reason="TOKENSELECT_ENGINE_SOURCES is not set: names of the engines are as they were read"
)


def _parsed(path: str) -> ast.Module:
    file = Path(str(fakes.SOURCES), *path.split("."))
    return ast.parse((file / "__init__.py" if file.is_dir() else file.with_suffix(".py")).read_text())


def _arguments(function: Any) -> list[str]:
    given = function.args
    more = [each for each in (given.vararg, given.kwarg) if each]
    names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs, *more)]
    return [name for name in names if name not in ("self", "cls")]


@published
@pytest.mark.parametrize("path, name", [(path, name) for path, names in fakes.FAKES.items() for name in names])
def test_names_are_those_of_the_published_sources(path: str, name: str) -> None:
    ours, tree = fakes.FAKES[path][name], _parsed(path)
    theirs = next((node for node in tree.body if getattr(node, "name", None) == name), None)
    if isinstance(theirs, ast.FunctionDef):
        assert list(inspect.signature(ours).parameters) == _arguments(theirs)
        return
    if not isinstance(theirs, ast.ClassDef):  # assigned, or imported from another module
        assert name in {
            part for node in ast.walk(tree) for part in (getattr(node, "id", ""), getattr(node, "name", ""))
        }
        return
    defined = {node.name: node for node in theirs.body if isinstance(node, ast.FunctionDef)}
    fields = {ast.unparse(node.target) for node in theirs.body if isinstance(node, ast.AnnAssign)}
    for each, value in vars(ours).items():
        function = getattr(value, "__func__", value)
        if inspect.isfunction(function) and each in defined:
            got = [argument for argument in inspect.signature(function).parameters if argument not in ("self", "cls")]
            # The pool's have more arguments, none of which is needed.
            wanted = _arguments(defined[each])
            assert got == (wanted[: len(got)] if name == "MHATokenToKVPool" else wanted), each
        elif inspect.isfunction(function):
            assert each.startswith("_"), f"{each} is not in {path}"
    if dataclasses.is_dataclass(ours):
        assert {field.name for field in dataclasses.fields(ours)} <= fields
    if issubclass(ours, Enum):
        assert {member.name for member in ours} <= set(_assigned(theirs))


def _assigned(kind: ast.ClassDef) -> dict[str, ast.expr]:
    return {ast.unparse(node.targets[0]): node.value for node in kind.body if isinstance(node, ast.Assign)}


@published
def test_orders_of_strides_are_those_of_the_published_sources() -> None:
    kinds = {node.name: node for node in _parsed("vllm.v1.kv_cache_layout").body if isinstance(node, ast.ClassDef)}
    orders = {name: ast.literal_eval(value) for name, value in _assigned(kinds["KVCacheLayout"]).items()}
    assert orders == LAYOUTS


@published
@pytest.mark.parametrize(
    "given, reasons",
    [
        ({}, []),
        ({"has_sliding_window": True}, ["sliding window not supported"]),
        ({"has_sink": True}, ["attention sinks not supported"]),
        ({"use_mla": True}, ["MLA not supported"]),
        ({"head_size": 80}, ["head_size not supported"]),
        ({"kv_cache_dtype": "fp8"}, ["kv_cache_dtype not supported"]),
        ({"block_size": 528}, []),
        ({"block_size": 8}, ["block_size not supported"]),
        ({"attn_type": "encoder_only"}, ["attention type encoder_only not supported"]),
        ({"use_dcp": True}, ["DCP not supported"]),
        ({"use_pcp": True}, ["PCP not supported"]),
        ({"device_capability": SimpleNamespace(major=7)}, ["compute capability not supported"]),
    ],
)
def test_vllm_validates_configurations(given: dict[str, Any], reasons: list[str]) -> None:
    from tokenselect.vllm.backend import TokenSelectBackend

    asked = {
        "head_size": 128, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": 16, "use_mla": False,
        "has_sink": False, "use_sparse": False, "use_mm_prefix": False, "use_per_head_quant_scales": False,
        "device_capability": SimpleNamespace(major=9), "attn_type": "decoder", **given,
    }  # fmt: skip
    assert TokenSelectBackend.validate_configuration(**asked) == reasons
