"""`TokenSelectCache`: what takes tokens back, moves rows and copies, beside transformers' own caches."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is missing: nothing of tokenselect.transformers is tested")
transformers = pytest.importorskip(
    "transformers", reason="transformers is missing: nothing of tokenselect.transformers is tested"
)

from transformers import DynamicCache
from transformers_models import ALL, CACHE, VOCAB, caches, close, one_thread, pair, prompt, refused, steps

import tokenselect
from tokenselect.transformers import TokenSelectCache, TokenSelectOptions

__all__ = ["one_thread"]


def test_a_cache_goes_on_in_another_call() -> None:
    eager, ours = pair("llama")
    ids, mask = prompt(2, 12)
    cache = TokenSelectCache(ours.config, ALL)
    first = ours.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **{CACHE: cache})
    assert cache.get_seq_length() == first.shape[1] - 1
    more = torch.cat([first, torch.randint(3, VOCAB, (2, 5))], 1)
    again = ours.generate(more, max_new_tokens=6, do_sample=False, **{CACHE: cache})
    assert torch.equal(again, eager.generate(more, max_new_tokens=6, do_sample=False))


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


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_copy_of_a_cache_goes_on_by_itself(kind: str) -> None:
    """A prompt that was read once is gone on with in many ways, as the documentation of transformers does."""
    eager, ours = pair(kind)
    ids, mask = prompt(3, 30, "left")
    options = TokenSelectOptions(top_k=4096, page_size=4)
    first = TokenSelectCache(ours.config, options)
    steps(ours, ids[:, :22], mask[:, :22], first, [22])
    second = copy.deepcopy(first)
    third: Any = copy.deepcopy({"cache": second, "twice": [second]})
    assert third["cache"] is third["twice"][0]
    assert (type(second), second.options, second.row_lengths, second.get_seq_length()) == (
        TokenSelectCache,
        options,
        first.row_lengths,
        22,
    )
    want = eager(ids, attention_mask=mask, position_ids=mask.cumsum(-1).sub(1).clamp(min=0)).logits
    other = ids.clone()
    other[:, 22:] = torch.randint(3, VOCAB, (3, 8))
    want_other = eager(other, attention_mask=mask, position_ids=mask.cumsum(-1).sub(1).clamp(min=0)).logits
    positions = mask.cumsum(-1).sub(1).clamp(min=0)
    # One column each in turn, so that each would find what the other one wrote.
    for column in range(22, 30):
        for cache, tokens, expected in ((first, ids, want), (second, other, want_other), (third["cache"], ids, want)):
            given = {"attention_mask": mask[:, : column + 1], "position_ids": positions[:, column : column + 1]}
            got = ours(tokens[:, column : column + 1], **given, **{CACHE: cache}).logits
            close(got, expected[:, column : column + 1], mask[:, column : column + 1])
    first.reset()
    second.crop(-1)
    assert (second.get_seq_length(), third["cache"].get_seq_length()) == (29, 30)


def test_copies_that_are_refused() -> None:
    _, ours = pair("llama")
    ids, _ = prompt(2, 12)
    cache = TokenSelectCache(ours.config, ALL)
    steps(ours, ids, torch.ones_like(ids), cache, [12])
    refused("a TokenSelectCache must be copied by `copy.deepcopy`", lambda: copy.copy(cache))
    refused("call `copy.deepcopy` of the cache", lambda: copy.deepcopy(cache.layers[0]))
    cache.update(torch.zeros(2, 2, 1, 16), torch.zeros(2, 2, 1, 16), 1)
    refused("must not be copied within a step: the keys of layers [1]", lambda: copy.deepcopy(cache), RuntimeError)


def test_rows_that_cannot_be_taken() -> None:
    _, ours = pair("llama")
    ids, mask = prompt(3, 12)
    cache = TokenSelectCache(ours.config, ALL)
    cache.batch_select_indices([])  # of no rows
    steps(ours, ids[:, :8], mask[:, :8], cache, [8])
    for text, wrong in {
        "`indices` must name at least one row, got none: `reset` takes all rows away": (
            lambda: cache.batch_select_indices([]),
            lambda: cache.batch_select_indices(torch.zeros(0, dtype=torch.long)),
            lambda: cache.batch_select_indices(torch.zeros(3, dtype=torch.bool)),
        ),
        "`indices` must say for each of 3 rows whether it stays, got shape (2,)": (
            lambda: cache.batch_select_indices(torch.ones(2, dtype=torch.bool)),
        ),
        "`indices` must name rows from 0 to 2, got -1": (lambda: cache.batch_select_indices([-1]),),
        "`indices` must be whole numbers in one dimension, got shape (1,) of torch.float32": (
            lambda: cache.batch_select_indices([0.5]),
        ),
        "`beam_idx` must name rows from 0 to 2, got 3": (lambda: cache.reorder_cache(torch.tensor([0, 3])),),
        "`beam_idx` must be whole numbers in one dimension, got shape (1, 1)": (
            lambda: cache.reorder_cache(torch.tensor([[0]])),
        ),
        "`repeats` must be at least 1, got 0": (lambda: cache.batch_repeat_interleave(0),),
    }.items():
        for one in wrong:
            refused(text, one, ValueError)
    assert cache.row_lengths == [8, 8, 8]
    cache.batch_select_indices([2, 0])
    assert cache.row_lengths == [8, 8]
    cache.batch_select_indices(torch.tensor([True, False]))
    assert cache.row_lengths == [8]


def test_a_cache_of_another_type_after_a_reset() -> None:
    """Pools are made anew for keys that they do not fit."""
    eager, ours = pair("llama")
    ids, mask = prompt(2, 20)
    cache: Any = TokenSelectCache(ours.config, ALL)
    steps(ours, ids, mask, cache, [18, 1, 1])
    kept = cache.layers[0].keys
    half = copy.deepcopy(ours).to(torch.bfloat16)
    with pytest.raises(tokenselect.ArgumentTypeError, match="`k pages` must be bf16, got f32"):
        half(ids[:, :1], **{CACHE: cache})
    for empty in (cache.reset, lambda: cache.crop(-cache.get_seq_length())):
        empty()
        logits = half(ids, attention_mask=mask, **{CACHE: cache}).logits
        assert cache.layers[0].keys.dtype == torch.bfloat16
        expected = copy.deepcopy(eager).to(torch.bfloat16)(ids, attention_mask=mask).logits
        assert (logits - expected).abs().max() < 0.1
        cache.reset()
        close(steps(ours, ids, mask, cache, [20]), eager(ids, attention_mask=mask).logits, mask)
    cache.reset()
    assert kept is not cache.layers[0].keys
    kept = cache.layers[0].keys
    steps(ours, ids, mask, cache, [20])
    assert cache.layers[0].keys is kept  # those that fit stay


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
