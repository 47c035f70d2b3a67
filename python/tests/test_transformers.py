"""`tokenselect.transformers` beside transformers' own eager attention, and beside the definitions computed in PyTorch.

Models are random and small. Where everything is selected, logits are eager's up to rounding and texts are the same; where fewer
tokens are, logits are those of `docs/definitions.md`, written out below token by token in float64.

    pytest python/tests/test_transformers.py
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is missing: nothing of tokenselect.transformers is tested")
transformers = pytest.importorskip(
    "transformers", reason="transformers is missing: nothing of tokenselect.transformers is tested"
)

from transformers import DynamicCache
from transformers_models import (
    ALL,
    CACHE,
    FEW,
    MODELS,
    VOCAB,
    caches,
    close,
    config_of,
    make,
    one_thread,
    pair,
    prompt,
    steps,
)

from tokenselect.transformers import TokenSelectCache, TokenSelectOptions, configure
from transformers_definitions import ByDefinition, blocks_of

__all__ = ["one_thread"]


# Everything selected: eager's results.


@pytest.mark.parametrize("rows, padding", [(1, "none"), (3, "none"), (3, "left"), (3, "right")])
@pytest.mark.parametrize("kind", MODELS)
def test_a_forward_has_the_logits_of_eager_attention(kind: str, rows: int, padding: str) -> None:
    eager, ours = pair(kind)
    ids, mask = prompt(rows, 29, padding)
    given = {} if padding == "none" else {"attention_mask": mask}
    expected = eager(ids, use_cache=False, **given).logits
    close(ours(ids, use_cache=False, **given).logits, expected, mask)
    close(ours(ids, **given).logits, expected, mask)  # over the dynamic cache that the forward makes
    for cache in caches(ours, ALL):
        close(ours(ids, **given, **{CACHE: cache}).logits, expected, mask)


@pytest.mark.parametrize("rows, padding", [(1, "none"), (3, "left")])
@pytest.mark.parametrize("kind", MODELS)
def test_prefill_in_chunks_and_decoding_have_the_logits_of_eager_attention(kind: str, rows: int, padding: str) -> None:
    eager, ours = pair(kind)
    ids, mask = prompt(rows, 33, padding)
    expected = steps(eager, ids, mask, DynamicCache(config=eager.config), [33])
    for lengths in ([28, *[1] * 5], [3, 13, 1, 11, 1, 4], [1, 32]):
        for cache in caches(ours, ALL):
            close(steps(ours, ids, mask, cache, lengths), expected, mask)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3_text", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_have_the_logits_of_eager_attention(kind: str, dtype: Any) -> None:
    eager, ours = pair(kind, dtype=dtype, initializer_range=0.05)
    exact = make(config_of(kind, initializer_range=0.05), "eager").to(dtype).float()
    ids, mask = prompt(3, 33, "left")
    expected = steps(exact, ids, mask, DynamicCache(config=exact.config), [33])
    theirs = steps(eager, ids, mask, DynamicCache(config=eager.config), [33])
    bound = ((theirs.float() - expected).abs() * mask[..., None]).max().item()
    for cache in caches(ours, ALL):
        got = steps(ours, ids, mask, cache, [28, *[1] * 5])
        error = ((got.float() - expected).abs() * mask[..., None]).max().item()
        # Both round activations between layers; ours not within attention.
        assert error <= 1.5 * bound, f"{error:.2e}, eager's is {bound:.2e}"


@pytest.mark.parametrize("kind", MODELS)
def test_generate_has_the_text_of_eager_attention(kind: str) -> None:
    eager, ours = pair(kind)
    for rows, padding in ((1, "none"), (3, "left")):
        ids, mask = prompt(rows, 21, padding)
        given: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
        expected = eager.generate(ids, **given)
        assert len(set(expected[0, 21:].tolist())) > 3, "the text says nothing"
        answer = ours.generate(ids, return_dict_in_generate=True, **given)
        assert torch.equal(answer.sequences, expected)
        assert isinstance(answer.past_key_values, TokenSelectCache)
        assert torch.equal(ours.generate(ids, **given, **{CACHE: DynamicCache(config=ours.config)}), expected)
        assert torch.equal(ours.generate(ids, **given, cache_implementation="static"), expected)
        assert torch.equal(ours.generate(ids, **given, use_cache=False), expected)


WAYS: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20},
    "sampling, several": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"do_sample": False, "num_beams": 4},
    "beams, sampling": {"do_sample": True, "num_beams": 3, "num_return_sequences": 2},
    "chunks": {"do_sample": False, "prefill_chunk_size": 7},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_other_ways_to_generate_have_the_text_of_eager_attention(kind: str, way: str) -> None:
    eager, ours = pair(kind)
    ids, mask = prompt(3, 21, "left")
    texts = []
    for model in (eager, ours):
        torch.manual_seed(5)
        texts.append(model.generate(ids, attention_mask=mask, max_new_tokens=14, **WAYS[way]))
    assert torch.equal(*texts)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "mistral"])
def test_assisted_generation_has_the_text_of_eager_attention(kind: str) -> None:
    eager, ours = pair(kind)
    # An assistant that is sometimes right: the model, a little off.
    assistant = copy.deepcopy(ours)
    for parameter in assistant.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.02)
    ids, mask = prompt(1, 21)
    given: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 30, "do_sample": False}
    expected = eager.generate(ids, **given)
    answer = ours.generate(ids, assistant_model=assistant, return_dict_in_generate=True, **given)
    assert torch.equal(answer.sequences, expected)
    assert isinstance(answer.past_key_values, TokenSelectCache)
    assert torch.equal(ours.generate(ids, prompt_lookup_num_tokens=3, **given), expected)
    texts = []
    for model in (eager, ours):
        torch.manual_seed(3)
        texts.append(
            model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=True, prompt_lookup_num_tokens=4)
        )
    assert torch.equal(*texts)


# Fewer tokens selected: the definitions.


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e3,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
REASSIGNED: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LLAMA3},
    "qwen2": {"rope_parameters": YARN},
    "qwen3": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "phi3": {},
    "gemma2": {},
    "gemma3_text": {},
    "cohere": {"logit_scale": 1.0},  # neighbours are rotated with each other
}


@pytest.mark.parametrize("positions", ["native", "reassigned"])
@pytest.mark.parametrize("kind", REASSIGNED)
def test_fewer_tokens_are_selected_by_definition(kind: str, positions: Literal["native", "reassigned"]) -> None:
    options = TokenSelectOptions(
        top_k=6, n_init=2, n_local=3, block_len=4, thresholds=None, positions=positions, page_size=4
    )
    eager, ours = pair(kind, options, **REASSIGNED[kind])
    ids, mask = prompt(3, 41, "left")
    everything = eager(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    # One prompt of 34 and seven steps of decoding, of which padding takes the first tokens.
    expected = ByDefinition(eager, lambda length: [*blocks_of([length - 7], 4), *[1] * 7], options).logits(ids, mask)
    assert ((expected - everything).abs() * mask[..., None]).max() > 0.05, "the selection must matter"
    for cache in caches(ours, options):
        close(steps(ours, ids, mask, cache, [34, *[1] * 7]), expected, mask, 2e-5)
    # In chunks: those of a row begin with blocks of their own.
    ids, mask = prompt(1, 41)
    expected = ByDefinition(eager, lambda length: blocks_of([13, 20, 8], 4), options).logits(ids, mask)
    for cache in caches(ours, options):
        close(steps(ours, ids, mask, cache, [13, 20, 8]), expected, mask, 2e-5)
    if positions == "reassigned":
        for model in (copy.deepcopy(ours), ours):
            configure(model, options, positions="native", top_k=4096)
            close(model(ids).logits, eager(ids).logits)


def test_chunks_that_are_whole_blocks_select_as_one_prompt() -> None:
    _, ours = pair("llama", FEW)
    ids, mask = prompt(1, 60)
    whole = steps(ours, ids, mask, TokenSelectCache(ours.config, FEW), [60])
    for lengths in ([20, 40], [4] * 15, [32, 8, 20]):
        for cache in caches(ours, FEW):
            close(steps(ours, ids, mask, cache, lengths), whole)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_texts_of_few_tokens_are_the_same_over_every_cache(kind: str) -> None:
    _, ours = pair(kind, FEW)
    ids, mask = prompt(3, 40, "left")
    for way in ({}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}, {"repetition_penalty": 1.3}):
        given: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 15, "do_sample": False, **way}
        texts = []
        for cache in ({}, {CACHE: DynamicCache(config=ours.config)}, {"cache_implementation": "static"}):
            torch.manual_seed(9)
            texts.append(ours.generate(ids, **given, **cache))
        assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])


def test_small_pieces_are_one_prompt_as_well() -> None:
    _, ours = pair("llama", FEW)
    ids, mask = prompt(2, 60, "left")
    whole = steps(ours, ids, mask, TokenSelectCache(ours.config, FEW), [60])
    pieces = TokenSelectOptions(**{**vars(FEW), "max_piece_len": 8, "max_workspace_bytes": 1 << 14})
    configure(ours, pieces)
    for cache in caches(ours, pieces):
        close(steps(ours, ids, mask, cache, [60]), whole, mask)


def test_reassigned_positions_with_everything_selected_are_the_models_own() -> None:
    for kind, changes in REASSIGNED.items():
        eager, ours = pair(kind, TokenSelectOptions(top_k=4096, positions="reassigned"), **changes)
        ids, mask = prompt(3, 30, "left")
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        expected = eager(ids, attention_mask=mask, position_ids=positions).logits
        close(ours(ids, attention_mask=mask, position_ids=positions).logits, expected, mask)
        given: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
        assert torch.equal(ours.generate(ids, **given), eager.generate(ids, **given))
        assert torch.equal(ours.generate(ids, num_beams=3, **given), eager.generate(ids, num_beams=3, **given))


def test_dense_layers_attend_to_all_tokens() -> None:
    eager, ours = pair("llama", TokenSelectOptions(**{**vars(FEW), "dense_layers": [0, 1]}))
    ids, mask = prompt(3, 40, "left")
    expected = steps(eager, ids, mask, DynamicCache(config=eager.config), [40])
    options = TokenSelectOptions(**{**vars(FEW), "dense_layers": [0, 1]})
    for cache in caches(ours, options):
        close(steps(ours, ids, mask, cache, [35, *[1] * 5]), expected, mask)
    one = TokenSelectOptions(**{**vars(FEW), "dense_layers": [0]})
    configure(ours, one)
    expected = ByDefinition(eager, lambda length: [*blocks_of([length - 5], 4), *[1] * 5], one).logits(ids, mask)
    for cache in caches(ours, one):
        close(steps(ours, ids, mask, cache, [35, *[1] * 5]), expected, mask, 2e-5)


def test_thresholds_of_layers_say_when_a_selection_is_used_again() -> None:
    _, ours = pair("llama")
    ids, mask = prompt(2, 60)
    counts = {}
    for name, thresholds in {"none": None, "never": 1.0, "always": -1.0, "one": {0: -1.0, 1: 1.0}}.items():
        options = TokenSelectOptions(**{**vars(FEW), "thresholds": thresholds})
        cache = TokenSelectCache(ours.config, options)
        steps(ours, ids, mask, cache, [40, *[1] * 20])
        counts[name] = cache.stats()
    assert counts["none"] == {"reused": 0, "scored": 0, "complete": 0}
    assert counts["never"] == {"reused": 0, "scored": 80, "complete": 0}
    # One selection, used again three times (`n_local`), twenty steps of two rows.
    assert counts["always"] == {"reused": 60, "scored": 20, "complete": 0}
    assert counts["one"] == {"reused": 30, "scored": 50, "complete": 0}


def test_selections_follow_rows() -> None:
    options = TokenSelectOptions(**{**vars(FEW), "thresholds": -1.0, "max_reuse": 100})
    _, ours = pair("llama", options)
    ids, mask = prompt(3, 40)
    reordered, straight = TokenSelectCache(ours.config, options), TokenSelectCache(ours.config, options)
    rows = [2, 2, 1]
    steps(ours, ids, mask, reordered, [38, 1, 1])
    reordered.reorder_cache(torch.tensor(rows))
    steps(ours, ids[rows], mask, straight, [38, 1, 1])
    new = torch.randint(3, VOCAB, (3, 1))
    longer = torch.ones(3, 41, dtype=torch.long)
    got = ours(new, attention_mask=longer, **{CACHE: reordered}).logits
    close(got, ours(new, attention_mask=longer, **{CACHE: straight}).logits)
    assert reordered.stats()["scored"] == straight.stats()["scored"] == 6


def test_crop_drops_selections_that_are_younger() -> None:
    options = TokenSelectOptions(**{**vars(FEW), "n_local": 10, "top_k": 1, "thresholds": -1.0, "max_reuse": 100})
    _, ours = pair("llama", options)
    ids, mask = prompt(1, 50)
    cache = TokenSelectCache(ours.config, options)
    steps(ours, ids, mask, cache, [40, *[1] * 10])
    assert cache.stats() == {"reused": 18, "scored": 2, "complete": 0}  # selected with 40 tokens before, in two layers
    for tokens_to_remove, scored in ((-5, 2), (-5, 2), (-3, 4)):
        cache.crop(tokens_to_remove)
        length = cache.get_seq_length() + 1
        ours(ids[:, length - 1 : length], attention_mask=mask[:, :length], **{CACHE: cache})
        assert cache.stats()["scored"] == scored
