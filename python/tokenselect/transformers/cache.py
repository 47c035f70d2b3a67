"""`TokenSelectCache`: keys and values of a model's layers in pages.

The cache knows rows, layers know pools. A forward is a *step*: `update` of a layer only announces keys and values, since which of them
are padding is known to the attention that follows; the first layer's attention of a step makes room for its tokens and the tables that
all layers of a kind share.

- Rows have lengths of their own: padding never enters.
- Pools, `[num_pages, page_size, num_kv_heads, head_dim]` for keys and for values of each layer, grow by doubling, or have what
  `max_length` asks for at once. Nothing is concatenated or copied at other steps.
- Rows share pages (beams), and copy a page when they write into it.
- Layers with a sliding window keep the pages that the window reaches.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from tokenselect import Batch, Device, SelectionCache
from tokenselect._options import at_least
from tokenselect.torch.devices import device_of

from .contexts import LayerConfig, kernels_for
from .layer import Announced, TokenSelectLayer
from .masks import RowMask
from .options import TokenSelectOptions
from .pages import PageTables
from .steps import Step, unpack

__all__ = ["TokenSelectCache", "unsupported"]


class _Selections:
    """Cached selections of the layers with one configuration; rows have places that forks change."""

    def __init__(self, device: Device, layer: LayerConfig, num_layers: int, num_places: int) -> None:
        self.layers: dict[int, int] = {}
        self._num_layers = num_layers
        self.cache = SelectionCache(device, layer.config(), num_layers=num_layers, num_sequences=num_places)

    def layer(self, layer_idx: int) -> int:
        return self.layers.setdefault(layer_idx, len(self.layers))


class TokenSelectCache(Cache):  # type: ignore[misc, unused-ignore]
    """A `transformers` cache over pages that the layers of `attn_implementation="tokenselect"` select from.

    ```python
    cache = TokenSelectCache(model.config, TokenSelectOptions(top_k=4096))
    model.generate(**inputs, cache=cache, max_new_tokens=100)  # `past_key_values=cache` in older transformers
    ```

    `max_length` are the most tokens of a row if they are known: its pages are then made at once. With `options.positions =
    "reassigned"`, the model needs `tokenselect.transformers.configure` with the same positions.

    `copy.deepcopy` copies the pools, so that a prompt that was read once is gone on with many times; the copy selects anew at its first
    step. `copy.copy`, after which two caches would write into the same pages, is refused.

    Raises `NotImplementedError` for models with layers that it has no place for (see `unsupported`).
    """

    layers: list[TokenSelectLayer]  # type: ignore[assignment, unused-ignore]

    def __init__(
        self, config: PreTrainedConfig, options: TokenSelectOptions | None = None, *, max_length: int | None = None
    ) -> None:
        text_config = config.get_text_config(decoder=True)
        reason = unsupported(text_config)
        if reason is not None:
            raise NotImplementedError(f"TokenSelectCache has no place for {reason}")
        self.options = options or TokenSelectOptions()
        num_layers = text_config.num_hidden_layers
        self.options.check_layers(num_layers)
        self.max_length = max_length
        sliding = _is_sliding(text_config)
        super().__init__(layers=[TokenSelectLayer(is_sliding=sliding[layer]) for layer in range(num_layers)])
        self._clear()

    def _clear(self) -> None:
        self._num_seen = 0
        self._kept: np.ndarray[Any, Any] | None = None  # [batch, num_seen] bool where a row has padding
        self._lens: list[int] = []
        self._tables: dict[int | None, PageTables] = {}  # by sliding window
        self._places: list[int] = []  # of rows in Selection Caches
        self._num_places = 0
        self._selections: dict[Any, _Selections] = {}
        self._step: Step | None = None

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first step."""
        return len(self._lens) or -1

    @property
    def row_lengths(self) -> list[int]:
        """Tokens of each row, without padding."""
        return list(self._lens)

    @property
    def is_initialized(self) -> bool:
        """Whether a step was made."""
        return bool(self._lens)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # tensors of a traced graph would lose the announcement
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Announces a layer's keys and values, `[batch, num_kv_heads, tokens, head_dim]`; the layer's attention writes them. Answers
        what it was given.

        Raises `RuntimeError` where the last ones were never attended to by `attn_implementation="tokenselect"`.
        """
        layer = self._layer(layer_idx)
        if layer.announced is not None:
            raise RuntimeError(
                f"the keys that layer {layer_idx} updated a TokenSelectCache with were not written: the model must have "
                "attn_implementation='tokenselect', and a forward that failed must be undone by `crop` or `reset`"
            )
        layer.announced = Announced(self, layer_idx, layer.num_seen)
        layer.num_seen += key_states.shape[-2]
        # The attention function is given tensors alone.
        key_states._tokenselect = layer.announced  # type: ignore[attr-defined, unused-ignore]
        return key_states, value_states

    def attend(
        self,
        announced: Announced,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: RowMask,
        config: LayerConfig,
        is_dense: bool,
    ) -> torch.Tensor:
        """Writes a layer's keys and values and attends: `query`, `[batch, num_qo_heads, tokens, head_dim]`, to `[batch, tokens,
        num_qo_heads, head_dim]`, zeros for padding."""
        layer = self._layer(announced.layer_idx)
        if layer.announced is not announced:
            raise RuntimeError(
                f"the keys of layer {announced.layer_idx} were written already, or the cache was cropped or reset since `update`"
            )
        step = self._begin(announced, mask)
        if layer.is_initialized and layer.window != mask.window:
            raise ValueError(
                f"layer {announced.layer_idx} must keep its sliding window of {layer.window}, got {mask.window}"
            )
        layer.window = mask.window
        k, v = step.pack(key), step.pack(value)
        tables = self._room(step, mask.window)
        if not any(step.old_lens):
            layer.forget_others(k)
        layer.reserve(tables.num_pages, tables.page_size, k)
        if not step.rows:
            out = query.new_zeros((0, query.shape[1], query.shape[3]))
        elif mask.window is not None or is_dense:
            out = self._attend_dense(step, layer, tables, step.pack(query), k, v, config.dense())
        else:
            out = self._attend_selected(step, announced.layer_idx, layer, tables, step.pack(query), k, v, config)
        layer.announced = None
        return unpack(out, step.index(query.device), step.batch_size, step.q_length)

    def _attend_dense(
        self,
        step: Step,
        layer: TokenSelectLayer,
        tables: PageTables,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        config: LayerConfig,
    ) -> torch.Tensor:
        device = self.options.device or device_of(q)
        kernels = kernels_for(device, config)
        batch = step.batch(tables, self._places, layer.window, device)
        context = kernels.step(*_limits(batch))
        assert layer.view is not None
        context.append(batch, layer.view, k, v)
        if layer.window is None:
            out: torch.Tensor = context.attend_dense(batch, layer.view, q)
            return out
        assert layer.token_view is not None
        return step.window_plan(tables, layer.window, q.device).attend(kernels, layer.token_view, q)

    def _attend_selected(
        self,
        step: Step,
        layer_idx: int,
        layer: TokenSelectLayer,
        tables: PageTables,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        config: LayerConfig,
    ) -> torch.Tensor:
        device = self.options.device or device_of(q)
        kernels = kernels_for(device, config)
        batch = step.batch(tables, self._places, None, device)
        selections = self._selections_of(device, config)
        cached = (None, 0) if selections is None else (selections.cache, selections.layer(layer_idx))
        assert layer.view is not None
        out: torch.Tensor
        if max(step.counts) == 1:
            context = kernels.step(*_limits(batch))
            context.append_select(batch, layer.view, q, k, v, selection_cache=cached[0], layer=cached[1])
            out = context.attend(batch, layer.view, q)
        else:
            context = kernels.reader(self.options, max(step.lens))
            pieces = step.pieces(batch, context, self.options.block_len)
            out = context.prefill_kv(pieces, layer.view, q, k, v, selection_cache=cached[0], layer=cached[1])
        return out

    def _begin(self, announced: Announced, mask: RowMask) -> Step:
        """The step that a layer's keys belong to, which begins with the first of them."""
        if mask.kv_offset != 0 or mask.q_offset != announced.begin:
            raise ValueError(
                f"the mask of layer {announced.layer_idx} must be for queries from position {announced.begin} on, it is for those from "
                f"{mask.q_offset}"
            )
        step = self._step
        if announced.begin < self._num_seen:
            if step is None or (step.begin, step.q_length, step.batch_size) != (
                mask.q_offset,
                mask.q_length,
                mask.batch_size,
            ):
                raise RuntimeError(
                    f"layer {announced.layer_idx} has {announced.begin} tokens and other layers {self._num_seen}: it was left out of a "
                    "step. `crop` takes all layers back"
                )
            return step
        behind = [
            index
            for index, layer in enumerate(self.layers)
            if layer.is_initialized and layer.num_seen < announced.begin
        ]
        if announced.begin > self._num_seen or behind:
            raise RuntimeError(
                f"layers {behind} of a TokenSelectCache have fewer than {announced.begin} tokens: `crop` takes all layers back"
            )
        return self._new_step(mask)

    def _new_step(self, mask: RowMask) -> Step:
        if self._lens and mask.batch_size != len(self._lens):
            raise ValueError(
                f"a TokenSelectCache of {len(self._lens)} rows got keys of {mask.batch_size}: `reset`, `reorder_cache` or a new cache"
            )
        kept = mask.kept()
        past = self._kept
        if kept is None and past is not None:
            raise ValueError(
                "`attention_mask` must be given: rows of the TokenSelectCache have padding, which it leaves out"
            )
        if kept is not None:
            known = np.ones((mask.batch_size, self._num_seen), bool) if past is None else past
            if not np.array_equal(kept[:, : self._num_seen], known):
                raise ValueError(
                    f"`attention_mask` must be for the {self._num_seen} tokens in the TokenSelectCache what it was when they came: padding "
                    "never enters the cache, and what entered cannot be padding later"
                )
        if not self._lens:
            self._lens = [0] * mask.batch_size
            self._places = list(range(mask.batch_size))
            self._num_places = mask.batch_size
        step = Step(mask, self._lens, None if kept is None else kept[:, self._num_seen :])
        self._kept = None if kept is None or kept.all() else kept
        self._lens = step.lens
        self._num_seen += mask.q_length
        self._step = step
        return step

    def _room(self, step: Step, window: int | None) -> PageTables:
        """Page tables of the layers with a window, with room for the step."""
        tables = self._tables.get(window)
        if tables is None:
            tables = self._tables[window] = PageTables(self.options.page_size, step.batch_size)
        if window not in step.grown:
            if window is not None and not any(layer.record_past for layer in self.layers):
                # What the window of the first token of this step reaches stays, so that the step can be undone.
                tables.drop_before([length - window + 1 for length in step.old_lens])
            held = tables

            def more(needed: int) -> None:
                held.reserve(max(held.num_pages + needed, 2 * held.num_pages, self._pages_at_once(step, window)))

            def copy(sources: list[int], targets: list[int]) -> None:
                from_pages, to_pages = torch.tensor(sources), torch.tensor(targets)
                for layer in self.layers:
                    if layer.keys is not None and layer.window == window:
                        layer.reserve(held.num_pages, held.page_size, layer.keys[0])
                        layer.copy_pages(from_pages, to_pages)

            tables.grow(step.lens, copy, more)
            step.grown.add(window)
        return tables

    def _pages_at_once(self, step: Step, window: int | None) -> int:
        """Pages that are made at first: for `max_length` tokens of each row."""
        if self.max_length is None or window is not None:
            return 0
        padding = self._num_seen - np.asarray(step.lens)
        return int(sum(-(-max(self.max_length - own, 0) // self.options.page_size) for own in padding))

    def _selections_of(self, device: Device, config: LayerConfig) -> _Selections | None:
        if config.threshold is None:
            return None
        key = (device, config)
        if key not in self._selections:
            # Room for forks before the rows that they replace are given back.
            self._selections[key] = _Selections(device, config, len(self.layers), 2 * self._num_places)
        return self._selections[key]

    def stats(self) -> dict[str, int]:
        """Rows of decoding steps whose selection was `reused`, `scored` anew, or `complete` (all tokens). Waits for the device."""
        stats = [selections.cache.stats() for selections in self._selections.values()]
        return {name: sum(getattr(each, name) for each in stats) for name in ("reused", "scored", "complete")}

    def activate_past_recording(self) -> None:
        """Keeps what sliding windows leave behind until `crop`, so that any number of steps can be undone."""
        for layer in self.layers:
            layer.activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last `-tokens_to_remove` positions away, in all layers and rows; also undoes a forward that failed.

        Raises `ValueError` for a positive number, and where a sliding window would need tokens that are gone: those of more than
        one step, unless `activate_past_recording` was called.
        """
        tokens_to_remove = int(tokens_to_remove)  # assisted generation has it in a tensor
        if tokens_to_remove > 0:
            raise ValueError(
                f"`tokens_to_remove` must be 0 or less, minus the tokens to remove, got {tokens_to_remove}"
            )
        num_seen = self._num_seen + tokens_to_remove
        written = [
            layer.announced.begin if layer.announced else layer.num_seen
            for layer in self.layers
            if layer.is_initialized
        ]
        least = min(written, default=0)
        if num_seen < 0 or num_seen > least:
            raise ValueError(
                f"`tokens_to_remove` must leave from 0 to the {least} tokens that all layers have, {num_seen} were left"
            )
        lens = [num_seen] * len(self._lens) if self._kept is None else self._kept[:, :num_seen].sum(axis=1).tolist()
        for window, tables in self._tables.items():
            for row, length in enumerate(lens):
                reach = 0 if window is None else max(length - window + 1, 0)
                if tables.begin(row) > reach:
                    raise ValueError(
                        f"a sliding window of {window} at {length} tokens of row {row} needs tokens from {reach} on, those before "
                        f"{tables.begin(row)} are gone: call `activate_past_recording` before the steps to undo"
                    )
        for layer in self.layers:
            layer.announced = None
            layer.num_seen = min(layer.num_seen, num_seen)
        for window, tables in self._tables.items():
            tables.truncate([min(length, tables.length(row)) for row, length in enumerate(lens)])
            if window is not None:
                tables.drop_before([length - window + 1 for length in lens])
        if tokens_to_remove:
            for selections in self._selections.values():
                for place, length in zip(self._places, lens, strict=True):
                    selections.cache.truncate(place, length)
        self._num_seen, self._lens = num_seen, lens
        kept = None if self._kept is None else self._kept[:, :num_seen]
        self._kept = None if kept is None or kept.all() else kept
        self._step = None

    def reset(self) -> None:
        """Takes all tokens away. Pools stay for keys like those that they were made for, and are made anew for others."""
        self._clear()
        for layer in self.layers:
            layer.num_seen, layer.announced = 0, None

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenSelectCache:
        behind = [index for index, layer in enumerate(self.layers) if layer.announced is not None]
        if behind:
            raise RuntimeError(
                f"a TokenSelectCache must not be copied within a step: the keys of layers {behind} were not written yet"
            )
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        # Contexts of a device, and cached selections, cannot be copied; options never change.
        own = {
            "options": self.options,
            "layers": [layer.copied() for layer in self.layers],
            "_selections": {},
            "_step": None,
        }
        made.__dict__.update(own)
        made.__dict__.update(
            (name, copy.deepcopy(value, memo)) for name, value in vars(self).items() if name not in own
        )
        return made

    def __copy__(self) -> TokenSelectCache:
        raise NotImplementedError(
            "a TokenSelectCache must be copied by `copy.deepcopy`: after `copy.copy` two caches would write into the same pages"
        )

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row `r` becomes what row `beam_idx[r]` was; both share pages until one writes."""
        self._take("beam_idx", _numbers("beam_idx", beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, one after the other."""
        at_least("repeats", repeats, 1)
        self._take("repeats", [row for row in range(len(self._lens)) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor | Sequence[int]) -> None:
        """The rows of `indices` alone, which are numbers or, for each row, whether it stays. At least one stays."""
        given = torch.as_tensor(indices)
        if given.dtype == torch.bool:
            if self._lens and given.shape != (len(self._lens),):
                raise ValueError(
                    f"`indices` must say for each of {len(self._lens)} rows whether it stays, got shape {tuple(given.shape)}"
                )
            given = given.nonzero().flatten()
        self._take("indices", _numbers("indices", given))

    def _take(self, name: str, rows: list[int]) -> None:
        if not self._lens:
            return
        if not rows:
            raise ValueError(f"`{name}` must name at least one row, got none: `reset` takes all rows away")
        for row in rows:
            if not 0 <= row < len(self._lens):
                raise ValueError(f"`{name}` must name rows from 0 to {len(self._lens) - 1}, got {row}")
        for tables in self._tables.values():
            tables.take(rows)
        self._lens = [self._lens[row] for row in rows]
        if self._kept is not None:
            kept = self._kept[rows]
            self._kept = None if kept.all() else kept
        self._take_places(rows)
        self._step = None

    def _take_places(self, rows: list[int]) -> None:
        if len(rows) > self._num_places:
            # More rows than Selection Caches have room for: selections are made anew.
            self._selections = {}
            self._places, self._num_places = list(range(len(rows))), len(rows)
            return
        free = sorted(set(range(2 * self._num_places)) - {self._places[row] for row in rows}, reverse=True)
        places: list[int] = []
        for row in rows:
            place = self._places[row]
            if place in places:
                source, place = place, free.pop()
                for selections in self._selections.values():
                    selections.cache.fork(source, place)
            places.append(place)
        self._places = places

    def _layer(self, layer_idx: int) -> TokenSelectLayer:
        if not 0 <= layer_idx < len(self.layers):
            raise ValueError(
                f"`layer_idx` must be below {len(self.layers)}, the layers of the TokenSelectCache, got {layer_idx}"
            )
        return self.layers[layer_idx]


def _numbers(name: str, rows: torch.Tensor | Sequence[int]) -> list[int]:
    """Whole numbers in a list, or in a tensor of one dimension."""
    given = torch.as_tensor(rows)
    if given.numel() == 0:
        return []  # of whatever type: an empty list has none
    if given.dim() != 1 or given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise ValueError(
            f"`{name}` must be whole numbers in one dimension, got shape {tuple(given.shape)} of {given.dtype}"
        )
    return [int(row) for row in given.tolist()]


def unsupported(text_config: PreTrainedConfig) -> str | None:
    """What of a decoder a `TokenSelectCache` has no place for; None if it has one for all of it."""
    if getattr(text_config, "is_encoder_decoder", False):
        return "encoders and cross-attention"
    if getattr(text_config, "num_kv_shared_layers", None):
        return f"layers that share keys ({text_config.num_kv_shared_layers} of them)"
    kinds = set(getattr(text_config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"layers of type {', '.join(sorted(kinds))}"
    if getattr(text_config, "attention_chunk_size", None) is not None and not getattr(text_config, "layer_types", None):
        return "chunked attention"
    return None


def _is_sliding(text_config: PreTrainedConfig) -> list[bool]:
    kinds = getattr(text_config, "layer_types", None)
    if kinds is not None:
        return [kind == "sliding_attention" for kind in kinds]
    return [getattr(text_config, "sliding_window", None) is not None] * text_config.num_hidden_layers


def _limits(batch: Batch) -> tuple[int, int, int]:
    return batch.info.num_rows, batch.info.max_block_len, batch.info.num_token_places
