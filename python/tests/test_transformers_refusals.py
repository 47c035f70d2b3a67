"""What `tokenselect.transformers` refuses, by name and with a reason, and the masks that it reads."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is missing: nothing of tokenselect.transformers is tested")
transformers = pytest.importorskip(
    "transformers", reason="transformers is missing: nothing of tokenselect.transformers is tested"
)


from transformers_models import ALL, CACHE, VOCAB, close, config_of, make, one_thread, pair, prompt, refused

import tokenselect
import tokenselect.transformers as ts
from tokenselect.transformers import TokenSelectCache, TokenSelectOptions, configure

__all__ = ["one_thread"]


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
    refused("configure() has no option topk; there are ", lambda: configure(ours, topk=3), TypeError)
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
