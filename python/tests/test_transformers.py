"""`tokenselect.transformers` beside transformers' own eager attention, and beside the definitions computed in PyTorch.

Models are random and small. Where everything is selected, logits are eager's up to rounding and texts are the same; where fewer
tokens are, logits are those of `docs/definitions.md`, written out below token by token in float64.

    pytest python/tests/test_transformers.py
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is missing: nothing of tokenselect.transformers is tested")
transformers = pytest.importorskip(
    "transformers", reason="transformers is missing: nothing of tokenselect.transformers is tested"
)
tokenselect = pytest.importorskip("tokenselect", reason="tokenselect is missing")

from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

import tokenselect.transformers as ts
from tokenselect.transformers import TokenSelectCache, TokenSelectOptions, configure
from transformers_definitions import ByDefinition, blocks_of

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
def _one_thread() -> Iterator[None]:
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


def test_a_cache_goes_on_in_another_call() -> None:
    eager, ours = pair("llama")
    ids, mask = prompt(2, 12)
    cache = TokenSelectCache(ours.config, ALL)
    first = ours.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **{CACHE: cache})
    assert cache.get_seq_length() == first.shape[1] - 1
    more = torch.cat([first, torch.randint(3, VOCAB, (2, 5))], 1)
    again = ours.generate(more, max_new_tokens=6, do_sample=False, **{CACHE: cache})
    assert torch.equal(again, eager.generate(more, max_new_tokens=6, do_sample=False))


# The cache.


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_crop_takes_tokens_back(kind: str, page_size: int) -> None:
    eager, ours = pair(kind)
    ids, mask = prompt(3, 30, "left")
    other = torch.cat([ids[:, :20], ids[:, :10] % 90 + 3], 1)
    expected = steps(eager, other, mask, DynamicCache(config=eager.config), [30])
    cache = TokenSelectCache(ours.config, TokenSelectOptions(top_k=4096, page_size=page_size))
    cache.activate_past_recording()
    steps(ours, ids, mask, cache, [18, 5, 1, 6])
    cache.crop(-10)
    assert cache.get_seq_length() == 20 and cache.row_lengths == [15, 20, 9]
    positions = mask.cumsum(-1).sub(1).clamp(min=0)
    got = ours(other[:, 20:], attention_mask=mask, position_ids=positions[:, 20:], **{CACHE: cache}).logits
    close(got, expected[:, 20:], mask[:, 20:])
    cache.crop(0)
    cache.reset()
    close(steps(ours, other, mask, cache, [30]), expected, mask)


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_rows_are_reordered_repeated_and_selected(kind: str, page_size: int) -> None:
    eager, ours = pair(kind)
    ids, mask = prompt(3, 22, "left")
    ours_cache = TokenSelectCache(ours.config, TokenSelectOptions(top_k=4096, page_size=page_size))
    eager_cache = DynamicCache(config=eager.config)
    steps(ours, ids, mask, ours_cache, [22])
    steps(eager, ids, mask, eager_cache, [22])

    def both(method: str, argument: Any, rows: list[int]) -> None:
        nonlocal mask
        for cache in (ours_cache, eager_cache):
            getattr(cache, method)(argument)
        mask = torch.cat([mask[rows], torch.ones(len(rows), 2, dtype=mask.dtype)], 1)
        new = torch.randint(3, VOCAB, (len(rows), 2))
        positions = (mask.cumsum(-1) - 1)[:, -2:]
        for columns in (slice(0, 1), slice(1, 2)):
            seen = mask[:, : mask.shape[1] - (1 if columns.start == 0 else 0)]
            given = {"attention_mask": seen, "position_ids": positions[:, columns]}
            got = ours(new[:, columns], **given, **{CACHE: ours_cache}).logits
            close(got, eager(new[:, columns], **given, **{CACHE: eager_cache}).logits)

    both("reorder_cache", torch.tensor([2, 2, 0]), [2, 2, 0])
    both("reorder_cache", torch.tensor([1, 0, 0]), [1, 0, 0])
    both("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2])
    both("batch_select_indices", torch.tensor([5, 0, 3]), [5, 0, 3])
    both("reorder_cache", torch.tensor([0, 1, 2]), [0, 1, 2])
    held = ours_cache._tables[None]
    assert held.num_pages - len(held._free) == len({page for row in range(3) for page in held.pages(row).tolist()})


def test_pages_behind_a_window_are_used_again() -> None:
    eager, ours = pair("gemma3_text")
    ids, mask = prompt(2, 200, "left")
    cache = TokenSelectCache(ours.config, TokenSelectOptions(top_k=4096, page_size=4), max_length=200)
    got = steps(ours, ids, mask, cache, [50, *[1] * 20, 13, *[1] * 117])
    close(got, steps(eager, ids, mask, DynamicCache(config=eager.config), [200]), mask)
    sizes = {layer.window: layer.keys.shape[0] * 4 for layer in cache.layers if layer.keys is not None}
    assert sizes[None] == (200 - 5 + 3) // 4 * 4 + 200, "`max_length` makes the pages at once"
    held = [len(cache._tables[5].pages(row)) for row in range(2)]
    assert max(held) <= 3, f"a window of 5 needs at most 3 pages of 4, {held} are held"


def test_a_row_of_padding_has_no_tokens() -> None:
    eager, ours = pair("gemma3_text")
    ids, mask = prompt(3, 14, "left")
    mask[1] = 0
    kept = [0, 2]
    expected = eager(ids[kept], attention_mask=mask[kept]).logits
    for cache in caches(ours, ALL):
        got = ours(ids, attention_mask=mask, **{CACHE: cache}).logits
        assert got.isfinite().all()
        close(got[kept], expected, mask[kept])
    cache = TokenSelectCache(ours.config, ALL)
    close(steps(ours, ids, mask, cache, [4, 8, 1, 1])[kept], expected, mask[kept])
    assert cache.row_lengths == [9, 0, 3]


def test_a_forward_that_failed_is_undone_by_crop() -> None:
    eager, ours = pair("gemma3_text")
    ids, mask = prompt(2, 20, "left")
    expected = steps(eager, ids, mask, DynamicCache(config=eager.config), [20])
    cache = TokenSelectCache(ours.config, ALL)

    def fail(*_: Any) -> None:
        raise KeyError("out of luck")

    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def forward(begin: int, end: int) -> Any:
        given = {"attention_mask": mask[:, :end], "position_ids": positions[:, begin:end], CACHE: cache}
        return ours(ids[:, begin:end], **given).logits

    def again(begin: int, end: int) -> Any:
        longer = torch.cat([mask[:, :end], mask[:, begin:end]], 1)
        return ours(ids[:, begin:end], attention_mask=longer, **{CACHE: cache})

    for begin, end in ((0, 12), (12, 17), (17, 18), (18, 20)):
        hook = ours.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(KeyError):
            forward(begin, end)
        hook.remove()
        if begin:
            refused("`crop` takes all layers back", functools.partial(again, begin, end), RuntimeError)
        cache.crop(begin - end)
        close(forward(begin, end), expected[:, begin:end], mask[:, begin:end])


def test_no_step_copies_the_cache() -> None:
    _, ours = pair("llama")
    ids, mask = prompt(1, 40)
    cache = TokenSelectCache(ours.config, ALL, max_length=64)
    places = set()
    for begin in range(40):
        ours(ids[:, begin : begin + 1], attention_mask=mask[:, : begin + 1], **{CACHE: cache})
        keys = cache.layers[0].keys
        assert keys is not None
        places.add(keys.data_ptr())
    assert len(places) == 1


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


# What is refused.


def refused(text: str, call: Callable[[], Any], kind: Any = NotImplementedError) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert text in str(caught.value), str(caught.value)


def test_masks_that_are_not_causal_are_refused() -> None:
    _, ours = pair("llama")
    eager = pair("llama")[0]
    ids, mask = prompt(2, 10, "left")
    causal = torch.ones(10, 10).tril().bool() & mask[:, None, None].bool()
    expected = eager(ids, attention_mask=mask).logits
    close(ours(ids, attention_mask=causal).logits, expected, mask)
    close(ours(ids, attention_mask=torch.where(causal, 0.0, torch.finfo(torch.float32).min)).logits, expected, mask)
    prefix = causal.clone()
    prefix[..., :6] = True
    refused(
        "takes 4-D masks that are causal with padding; this `attention_mask` of shape (2, 1, 10, 10) is not",
        lambda: ours(ids, attention_mask=prefix),
    )
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]])
    refused(
        "has no kernel for several sequences packed in one row",
        lambda: ours(ids[:1], position_ids=positions, use_cache=False),
    )

    def made(**more: Any) -> Any:
        return transformers.masking_utils.create_causal_mask(ours.config, torch.zeros(1, 4, 64), None, None, **more)

    refused("tokens that see tokens behind them", lambda: made(or_mask_function=lambda *_: True))
    refused(
        "the mask function `test_masks_that_are_not_causal_are_refused", lambda: made(and_mask_function=lambda *_: True)
    )


def test_encoders_are_refused() -> None:
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    config._attn_implementation = "tokenselect"
    bert = transformers.BertModel(config).eval()
    refused("has no kernel for encoders and cross-attention", lambda: bert(torch.ones(1, 4, dtype=torch.long)))


def test_attention_sinks_are_refused() -> None:
    config = config_of("gpt_oss", num_local_experts=2, num_experts_per_tok=1, sliding_window=8)
    refused(
        "does not serve attention sinks (`s_aux`)",
        lambda: make(config, "tokenselect")(torch.ones(1, 4, dtype=torch.long)),
    )


def test_training_is_refused() -> None:
    ours = make(config_of("llama", attention_dropout=0.25), "tokenselect")
    ids, _ = prompt(1, 6)
    refused("does not serve dropout (0.25)", lambda: ours.train()(ids))
    with torch.enable_grad():
        loss = ours.eval()(ids, labels=ids).loss
        refused("has no gradient: it is for inference", loss.backward)


def test_weights_of_attention_are_refused() -> None:
    _, ours = pair("llama")
    ids, _ = prompt(1, 6)
    refused("output_attentions", lambda: ours(ids, output_attentions=True), (NotImplementedError, ValueError))
    refused(
        "output_attentions",
        lambda: ours.generate(ids, output_attentions=True, return_dict_in_generate=True, max_new_tokens=2),
        (NotImplementedError, ValueError),
    )


def test_heads_that_the_device_lacks_are_refused() -> None:
    ours = make(config_of("llama", head_dim=12), "tokenselect")
    refused("head_dim", lambda: ours(torch.ones(1, 4, dtype=torch.long)), (tokenselect.Error, ValueError))
    ours = make(config_of("llama"), "tokenselect").double()
    refused(
        "takes queries and keys of float16, bfloat16 or float32, got torch.float64",
        lambda: ours(torch.ones(1, 4, dtype=torch.long)),
    )


def test_layers_without_a_place_in_the_cache_are_refused() -> None:
    config = config_of("llama")
    config.layer_types = ["full_attention", "chunked_attention"]
    refused("TokenSelectCache has no place for layers of type chunked_attention", lambda: TokenSelectCache(config))
    config = config_of("llama")
    config.num_kv_shared_layers = 1
    refused("TokenSelectCache has no place for layers that share keys (1 of them)", lambda: TokenSelectCache(config))


def test_padding_that_comes_later_is_refused() -> None:
    _, ours = pair("llama")
    ids, mask = prompt(3, 12, "left")
    cache = TokenSelectCache(ours.config, ALL)
    ours(ids[:, :8], attention_mask=mask[:, :8], **{CACHE: cache})
    refused(
        "`attention_mask` must be given: rows of the TokenSelectCache have padding",
        lambda: ours(ids[:, 8:], **{CACHE: cache}),
        ValueError,
    )
    cache.crop(-0)
    for layer in cache.layers:
        assert layer.num_seen == 8
    wrong = mask.clone()
    wrong[1, 0] = 0
    refused(
        "`attention_mask` must be for the 8 tokens",
        lambda: ours(ids[:, 8:], attention_mask=wrong, **{CACHE: cache}),
        ValueError,
    )
    cache.crop(0)
    got = ours(ids[:, 8:], attention_mask=mask, **{CACHE: cache}).logits
    close(got, pair("llama")[0](ids, attention_mask=mask).logits[:, 8:], mask[:, 8:])
    refused("a TokenSelectCache of 3 rows got keys of 1", lambda: ours(ids[:1], **{CACHE: cache}), ValueError)


def test_a_cache_under_another_attention_is_refused() -> None:
    eager, ours = pair("llama")
    ids, _ = prompt(1, 12)
    cache = TokenSelectCache(ours.config, ALL)
    eager(ids[:, :8], **{CACHE: cache})
    refused(
        "the model must have attn_implementation='tokenselect'",
        lambda: eager(ids[:, 8:], **{CACHE: cache}),
        RuntimeError,
    )
    cache.reset()
    close(ours(ids, **{CACHE: cache}).logits, eager(ids).logits)


def test_crop_beyond_a_window_is_refused() -> None:
    _, ours = pair("gemma3_text")
    ids, mask = prompt(1, 40)
    cache = TokenSelectCache(ours.config, TokenSelectOptions(top_k=4096, page_size=1))
    steps(ours, ids, mask, cache, [30, 5, 5])
    refused(
        "a sliding window of 5 at 30 tokens of row 0 needs tokens from 26 on, those before 31 are gone",
        lambda: cache.crop(-10),
        ValueError,
    )
    refused("`tokens_to_remove` must be 0 or less", lambda: cache.crop(3), ValueError)
    refused("`tokens_to_remove` must leave from 0 to the 40 tokens", lambda: cache.crop(-41), ValueError)
    refused("call `crop` of the cache", lambda: cache.layers[0].crop(-1))
    cache.crop(-5)
    assert cache.get_seq_length() == 35


def test_reassigned_positions_are_refused_by_name() -> None:
    dynamic = make(
        config_of("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "tokenselect"
    )
    refused(
        "positions='reassigned' does not have the rope type 'dynamic'",
        lambda: configure(dynamic, positions="reassigned"),
    )
    assert not hasattr(dynamic, "_tokenselect_options")
    untruncated = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "truncate": False,
    }
    model = make(config_of("qwen2", rope_parameters=untruncated), "tokenselect")
    refused(
        "frequencies of the model's rope type 'yarn' differ from the library's",
        lambda: configure(model, positions="reassigned"),
    )
    _, ours = pair("llama")
    options = TokenSelectOptions(positions="reassigned")
    ids, _ = prompt(1, 6)
    refused(
        "layer 0 selects with reassigned positions and must have RoPE taken away",
        lambda: ours(ids, **{CACHE: TokenSelectCache(ours.config, options)}),
        ValueError,
    )
    configure(ours, options)
    refused(
        "layer 0 attends with native positions and must keep its RoPE",
        lambda: ours(ids, **{CACHE: TokenSelectCache(ours.config, ALL)}),
        ValueError,
    )


def test_options_name_their_rule() -> None:
    for text, given in {
        "`top_k` must be at least 1, got 0": {"top_k": 0},
        "`n_init` must be a whole number, got 1.5": {"n_init": 1.5},
        "`page_size` must be at most 256, got 300": {"page_size": 300},
        "`vote_pool_window` must be odd, got 4": {"vote_pool_window": 4},
        "`thresholds` must be from -1 to 1, got 2": {"thresholds": 2},
        "`thresholds` must be from -1 to 1, got 'a'": {"thresholds": {0: "a"}},
        "`positions` must be native or reassigned, got absolute": {"positions": "absolute"},
        "`dense_layers` must be at least 0, got -1": {"dense_layers": [-1]},
    }.items():
        refused(text, lambda given=given: TokenSelectOptions(**given), ValueError)  # type: ignore[misc]
    eager, ours = pair("llama")
    refused("`dense_layers` must name layers below 2, got 2", lambda: configure(ours, dense_layers=[2]), ValueError)
    refused(
        "`thresholds` must name layers below 2, got 5",
        lambda: TokenSelectCache(ours.config, TokenSelectOptions(thresholds={5: 0.5})),
        ValueError,
    )
    refused("`model` must have attn_implementation='tokenselect', it has 'eager'", lambda: configure(eager), ValueError)


def test_workspaces_are_given_back() -> None:
    _, ours = pair("llama")
    ids, _ = prompt(1, 6)
    expected = ours(ids).logits
    ts.release()
    assert torch.equal(ours(ids).logits, expected)


@pytest.mark.parametrize(
    "mask, text",
    [
        (torch.ones(1, 1, 9, 9).tril(), "has other values: biases"),
        (-torch.ones(1, 1, 9, 9).triu(1), "has other values: biases"),
        (torch.full((1, 1, 9, 9), -torch.inf).triu(1) - 0.5 * torch.ones(9, 9).tril(-1), "has other values: biases"),
        (torch.ones(1, 1, 9, 9).tril().long(), "must be bool or added to logits, got torch.int64"),
    ],
)
def test_a_mask_of_biases_is_refused(mask: Any, text: str) -> None:
    _, ours = pair("llama")
    with pytest.raises(NotImplementedError, match=text):
        ours(torch.randint(3, VOCAB, (1, 9)), attention_mask=mask)


def test_a_mask_of_packed_sequences_is_refused() -> None:
    _, ours = pair("llama")
    packed = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril() & (torch.arange(9)[:, None] // 4 == torch.arange(9) // 4)
    with pytest.raises(NotImplementedError, match="takes 4-D masks that are causal with padding"):
        ours(torch.randint(3, VOCAB, (1, 9)), attention_mask=packed)


@pytest.mark.parametrize(
    "kept", [[1, 1, 1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 1, 1, 1, 0]]
)
def test_a_mask_of_padding(kept: list[int]) -> None:
    eager, ours = pair("llama")
    ids, tokens = torch.randint(3, VOCAB, (1, 9)), torch.tensor(kept).bool()
    causal = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril() & tokens
    for mask in (causal, causal & tokens[:, None], causal | torch.eye(9, dtype=torch.bool)):
        added = torch.zeros(1, 1, 9, 9).masked_fill(~mask, torch.finfo(torch.float32).min)
        close(ours(ids, attention_mask=mask).logits, eager(ids, attention_mask=added).logits, tokens[None].float())


@pytest.mark.parametrize("hidden", [-torch.inf, torch.finfo(torch.float32).min, -1e4])
def test_a_mask_that_is_added(hidden: float) -> None:
    eager, ours = pair("llama")
    ids, mask = torch.randint(3, VOCAB, (1, 9)), torch.full((1, 1, 9, 9), hidden).triu(1)
    close(ours(ids, attention_mask=mask).logits, eager(ids, attention_mask=mask).logits)


def test_another_implementation_without_rope_is_refused() -> None:
    _, ours = pair("llama", TokenSelectOptions(positions="reassigned"))
    ids = torch.randint(3, VOCAB, (1, 9))
    ours(ids)
    ours.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="has taken RoPE away from this model, which has attn_implementation='sdpa'"):
        ours(ids)
    ours.set_attn_implementation("tokenselect")
    configure(ours, ALL)
    ours.set_attn_implementation("eager")
    close(ours(ids).logits, make(config_of("llama"), "eager")(ids).logits)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"device": "cpu"}, "`device` must be a tokenselect.Device, got 'cpu'"),
        ({"dense_layers": 0}, "`dense_layers` must be a list of numbers of layers, got 0"),
    ],
)
def test_options_of_other_types(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        TokenSelectOptions(**options)
