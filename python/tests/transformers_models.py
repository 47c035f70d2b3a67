"""Small random models of transformers', with eager attention and with ours, and what is asked of both."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is missing: nothing of tokenselect.transformers is tested")
transformers = pytest.importorskip(
    "transformers", reason="transformers is missing: nothing of tokenselect.transformers is tested"
)

from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

from tokenselect.transformers import TokenSelectCache, TokenSelectOptions, configure

VOCAB = 97
# The argument of a forward and of `generate` that takes a cache.
CACHE = (
    "cache" if "cache" in transformers.LlamaForCausalLM.forward.__wrapped__.__code__.co_varnames else "past_key_values"
)
ALL = TokenSelectOptions(top_k=4096)
FEW = TokenSelectOptions(top_k=6, n_init=2, n_local=3, block_len=4, thresholds=None)

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.15,
    "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48},
    "qwen2": {},
    "qwen3": {"head_dim": 24},
    "mistral": {"sliding_window": 8},
    "phi3": {"sliding_window": None, "num_key_value_heads": 4},
    "gemma2": {"sliding_window": 8, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 40},
    "gemma3_text": {
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 9,
    },
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For tests that import it: fixtures are found by name."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with torch.no_grad():
        yield


def config_of(kind: str, **changes: Any) -> Any:
    return AutoConfig.for_model(kind, **{**SIZES, **MODELS.get(kind, {}), **changes})


def make(config: Any, implementation: str, dtype: Any = None) -> Any:
    torch.manual_seed(1)
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(copy.deepcopy(config), attn_implementation=implementation).eval()
    return model if dtype is None else model.to(dtype)


def pair(kind: str, options: TokenSelectOptions = ALL, dtype: Any = None, **changes: Any) -> tuple[Any, Any]:
    """The same model with eager attention and with ours."""
    config = config_of(kind, **changes)
    ours = make(config, "tokenselect", dtype)
    configure(ours, options)
    return make(config, "eager", dtype), ours


def prompt(rows: int, length: int, padding: str = "none") -> tuple[Any, Any]:
    """Tokens and their mask; all rows but one are padded."""
    ids = torch.randint(3, VOCAB, (rows, length))
    mask = torch.ones_like(ids)
    for row in range(rows if padding != "none" else 0):
        count = [5, 0, 11][row % 3]
        if padding == "left":
            mask[row, :count] = 0
        elif count:
            mask[row, -count:] = 0
    return ids, mask


def close(got: Any, expected: Any, mask: Any = None, relative: float = 1e-5) -> None:
    """The largest error over tokens that are not padding, relative to the largest element."""
    error = (got.double() - expected.double()).abs()
    if mask is not None:
        error = error * mask[..., None]
    scale = expected.double().abs().max().item()
    assert scale > 0.5, "the expected logits say nothing"
    assert error.max().item() <= relative * scale, (
        f"{error.max().item() / scale:.1e} relative, {relative:.1e} is allowed"
    )


def steps(model: Any, ids: Any, mask: Any, cache: Any, lengths: list[int]) -> Any:
    """Logits of all tokens, read in steps of `lengths`, with positions that leave padding out."""
    logits, begin = [], 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    assert sum(lengths) == ids.shape[1]
    for length in lengths:
        end = begin + length
        out = model(
            ids[:, begin:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, begin:end],
            use_cache=True,
            **{CACHE: cache},
        )
        logits.append(out.logits)
        begin = end
    return torch.cat(logits, 1)


def caches(model: Any, options: TokenSelectOptions) -> list[Any]:
    return [
        TokenSelectCache(model.config, options),
        DynamicCache(config=model.config),
        StaticCache(config=model.config, max_cache_len=64),
    ]


def refused(text: str, call: Callable[[], Any], kind: Any = NotImplementedError) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert text in str(caught.value), str(caught.value)
