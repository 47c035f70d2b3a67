"""What the tests of the engines' backends share: fixtures, choices, and sequences that are read forward after forward."""

# ruff: noqa: E402 (what is missing is said before it is imported)

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip(
    "torch", reason="PyTorch is missing: nothing of tokenselect.vllm and tokenselect.sglang is tested"
)
tokenselect = pytest.importorskip("tokenselect", reason="tokenselect is missing")

import fake_engines as fakes
from emulated_graph import FakeSlot, RecordedContext, is_capturing
from engines_definitions import attention
from tokenselect.engines import EngineOptions

HQ, HKV, D, LAYERS = 6, 2, 16, 2
SCALE = 0.3
ALL = EngineOptions(top_k=4096)
FEW = EngineOptions(top_k=5, n_init=2, n_local=3, block_len=4)
CHOICES = {
    "all": ALL,
    "few": FEW,
    "pooled, other scale": dataclasses.replace(FEW, vote_pool_window=1, score_scale=0.7),
    "dense below": dataclasses.replace(FEW, dense_below=14),
    "dense layer": dataclasses.replace(FEW, dense_layers=(1,)),
}


@pytest.fixture(autouse=True)
def engines(monkeypatch: Any) -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for name in [name for name in os.environ if name.startswith("TOKENSELECT_") and name != "TOKENSELECT_LIBRARY"]:
        monkeypatch.delenv(name)
    fakes.OVERRIDES.clear()
    fakes.ATTENTION_BACKENDS.clear()
    fakes.ATTENTION_BACKEND_CHOICES[:] = ["triton"]
    with fakes.installed():
        yield


@pytest.fixture
def on_device(monkeypatch: Any) -> None:
    """Tables are translated where they lie, as on a GPU."""
    from tokenselect.engines import contexts, device_step
    from tokenselect.sglang import backend
    from tokenselect.vllm import metadata

    FakeSlot.made.clear()
    contexts._shared.clear()
    for module in (backend, metadata):
        monkeypatch.setattr(module, "is_on_device", lambda tensor: True)
    monkeypatch.setattr(device_step, "is_capturing", is_capturing)
    monkeypatch.setattr(device_step, "BatchSlot", FakeSlot)
    monkeypatch.setattr(contexts, "Context", RecordedContext)


def close(got: Any, expected: Any, relative: float = 2e-6) -> None:
    """The largest error, relative to the largest element."""
    scale = expected.abs().max().item()
    error = (got.double() - expected.double()).abs().max().item()
    assert scale > 0.1 and error <= relative * scale, f"{error / scale:.1e} relative, {relative:.1e} is allowed"


class Sequences:
    """Queries, keys and values of sequences, and the forwards that they were read in."""

    def __init__(self, options: EngineOptions, dtype: Any = torch.float32, cap: float = 0.0) -> None:
        self.options, self.dtype, self.cap = options, dtype, cap
        self.steps: dict[str, list[int]] = {}
        self._qkv: dict[str, Any] = {}

    def new(self, name: str, count: int) -> None:
        """New tokens of a sequence."""
        fresh = [[torch.randn(count, heads, D).to(self.dtype) for heads in (HQ, HKV, HKV)] for _ in range(LAYERS)]
        had = self._qkv.get(name)
        self._qkv[name] = (
            fresh
            if had is None
            else [[torch.cat(pair) for pair in zip(*layers, strict=True)] for layers in zip(had, fresh, strict=True)]
        )
        self.steps.setdefault(name, []).append(count)

    def length(self, name: str) -> int:
        return sum(self.steps.get(name, ()))

    def latest(self, names: list[str], layer: int, padding: int = 0) -> list[Any]:
        """Queries, keys and values of the last forward, one sequence after the other, and padding."""
        parts = [[x[-self.steps[name][-1] :] for x in self._qkv[name][layer]] for name in names]
        packed = [torch.cat(part) for part in zip(*parts, strict=True)]
        return [torch.cat([x, torch.full((padding, *x.shape[1:]), 7.0, dtype=self.dtype)]) for x in packed]

    def expected(self, names: list[str], layer: int) -> Any:
        """Outputs of the last forward."""
        outs = []
        for name in names:
            steps, is_dense = self.steps[name], layer in self.options.dense_layers
            q, k, v = self._qkv[name][layer]
            out = attention(q, k, v, steps, self.options, SCALE, self.cap, is_dense)
            outs.append(out[-steps[-1] :])
        return torch.cat(outs)


# What the engines' runners do with them, forward after forward: new tokens of each sequence. Prompts of several sequences, one in
# chunks behind a prefix that is cached, decoding, and both in one batch.
FORWARDS: list[dict[str, int]] = [
    {"a": 11, "b": 5},
    {"a": 1, "b": 9, "c": 14},
    {"a": 1, "b": 1, "c": 13},
    {"a": 1, "b": 1, "c": 1},
    {"c": 1, "a": 1},
    {"d": 1, "c": 1},
]
