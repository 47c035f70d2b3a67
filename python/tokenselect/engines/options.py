"""What a user of an engine may choose, in one dataclass and by environment variables."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from tokenselect._options import at_least, finite_or_none, layers, odd

__all__ = ["EngineOptions"]

_PREFIX = "TOKENSELECT_"


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How layers select. Every field is an environment variable, too: `top_k` is `TOKENSELECT_TOP_K`, in each process of the engine.

    - `top_k`: Tokens chosen by vote, at least 1.
    - `n_init`: First tokens of a sequence that are always selected.
    - `n_local`: Last tokens before the current block that are always selected.
    - `block_len`: Tokens of a prompt that share one selection. Short blocks (4 to 16) are nearer to dense attention
      and cost more passes over the keys; 512 is the paper's.
    - `dense_layers`: Layers that attend to all tokens: `TOKENSELECT_DENSE_LAYERS=0,1`.
    - `dense_below`: Sequences of up to so many tokens are attended to whole, in prompts and in steps that read
      their tables on the host. Steps that may be captured in a CUDA graph select for every length.
    - `score_scale`: Factor on scoring dot products; None for the layer's own scale.
    - `vote_pool_window`: Odd width of the max-pool over votes; 1 for none.
    - `max_kv_tokens`: Tokens of all sequences of a decoding step together, each rounded up to whole pages, that the
      workspace has room for on a GPU. None for all that the engine's cache holds, or fewer where its sequences
      cannot be as long. Prefixes that sequences share count once for each.
    - `max_piece_len`: Tokens of a prompt that one pass works on.
    - `max_workspace_bytes`: Most bytes of the workspace in which prompts are read, for each configuration of
      layers.
    - `dense_backend`: SGLang alone: the name of its backend for layers that cannot select, those with a sliding
      window among them: `triton`.

    Raises `ValueError`, which names the option, its rule and what was given.
    """

    top_k: int = 2048
    n_init: int = 128
    n_local: int = 512
    block_len: int = 512
    dense_layers: Collection[int] = ()
    dense_below: int = 0
    score_scale: float | None = None
    vote_pool_window: int = 1
    max_kv_tokens: int | None = None
    max_piece_len: int = 8192
    max_workspace_bytes: int = 1 << 30
    dense_backend: str | None = None

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None or name != "max_kv_tokens":
                at_least(name, value, least)
        odd("vote_pool_window", self.vote_pool_window)
        finite_or_none("score_scale", self.score_scale)
        object.__setattr__(self, "dense_layers", layers("dense_layers", self.dense_layers))
        if self.dense_backend is not None and not isinstance(self.dense_backend, str):
            raise ValueError(f"`dense_backend` must be the name of a backend, got {self.dense_backend!r}")

    @classmethod
    def read(cls, given: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None) -> EngineOptions:
        """Options of the environment, those of `given` before them.

        Raises `ValueError` for names in `given` that are no options, and for values that are not as they must be.
        """
        environ = os.environ if environ is None else environ
        fields: dict[str, Any] = {}
        for name in _names():
            text = environ.get(f"{_PREFIX}{name.upper()}")
            if text is None:
                continue
            try:
                fields[name] = _PARSE.get(name, int)(text)
            except ValueError:
                raise ValueError(
                    f"{_PREFIX}{name.upper()} must be {_WORDS.get(name, 'a whole number')}, got {text!r}"
                ) from None
        for name, value in (given or {}).items():
            if name not in _names():
                raise ValueError(f"`{name}` is no option of tokenselect, there are {', '.join(_names())}")
            fields[name] = value
        return cls(**fields)


_LEAST = {
    "top_k": 1,
    "n_init": 0,
    "n_local": 0,
    "block_len": 1,
    "dense_below": 0,
    "max_kv_tokens": 1,
    "max_piece_len": 1,
    "max_workspace_bytes": 1,
}


def _names() -> list[str]:
    return [field.name for field in dataclasses.fields(EngineOptions)]


def _layers(text: str) -> tuple[int, ...]:
    return tuple(int(layer) for layer in text.split(",") if layer.strip())


_PARSE: dict[str, Callable[[str], Any]] = {"score_scale": float, "dense_layers": _layers, "dense_backend": str}
_WORDS = {"score_scale": "a number", "dense_layers": "numbers of layers, `0,1`"}
