"""Token selection as an attention backend of vLLM, written against the interfaces of 0.33.

    vllm serve MODEL --attention-backend CUSTOM
    vllm serve MODEL --attention-config '{"backend_per_kind": {"full_attention": "CUSTOM"}}'  # the model has other layers, too

vLLM finds `register` by the entry point of the group `vllm.general_plugins`; without it, call `tokenselect.vllm.register()` before the
engine is made. Options are those of `EngineOptions`: `TOKENSELECT_TOP_K=4096`, or
`--additional-config '{"tokenselect": {"top_k": 4096}}'`. Importing this needs neither vLLM nor PyTorch.
"""

from __future__ import annotations

import logging

__all__ = ["register"]

_BACKEND = "tokenselect.vllm.backend.TokenSelectBackend"


def register() -> None:
    """Makes the backend vLLM's `CUSTOM`. May be called any number of times. Another package's backend of that name stays, with a
    warning: vLLM calls this wherever the package is installed, whether it is wanted or not.

    Raises `ImportError` without vLLM.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    custom = AttentionBackendEnum.CUSTOM
    if custom.is_overridden() and custom.get_path() != _BACKEND:
        logging.getLogger(__name__).warning(
            "vLLM's attention backend CUSTOM is %s already, tokenselect is left out: VLLM_PLUGINS names the plugins that are loaded",
            custom.get_path(),
        )
        return
    register_backend(custom, _BACKEND)
