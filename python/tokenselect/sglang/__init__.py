"""Token selection as an attention backend of SGLang, written against the interfaces of 0.5.23.

    sglang serve MODEL --attention-backend tokenselect --cuda-graph-backend-prefill disabled

SGLang finds `register` by the entry point of the group `sglang.srt.plugins`; without it, call `tokenselect.sglang.register()` before
`ServerArgs` is made, in every process. Options are those of `EngineOptions`: `TOKENSELECT_TOP_K=4096`. Importing this needs neither
SGLang nor PyTorch.
"""

from __future__ import annotations

from typing import Any

__all__ = ["NAME", "register"]

NAME = "tokenselect"


def register() -> None:
    """Adds the backend `tokenselect` and its choice on the command line. May be called any number of times.

    Raises `ImportError` without SGLang.
    """
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices

    register_attention_backend(NAME)(_create)
    if NAME not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([NAME])


def _create(runner: Any) -> Any:
    from .backend import TokenSelectAttnBackend

    return TokenSelectAttnBackend(runner)
