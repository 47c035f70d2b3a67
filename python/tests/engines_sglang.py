"""What SGLang's runner does: pools, batches and calls of every layer."""

# ruff: noqa: E402 (what is missing is said before it is imported)

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip(
    "torch", reason="PyTorch is missing: nothing of tokenselect.vllm and tokenselect.sglang is tested"
)
tokenselect = pytest.importorskip("tokenselect", reason="tokenselect is missing")

from engines_runners import HKV, HQ, LAYERS, SCALE, D, Sequences, close

import fake_engines as fakes
from fake_engines import ForwardMode
from tokenselect.engines import EngineOptions


class Sglang:
    """SGLang's runner: slots in any order, a row of `req_to_token` for each request, row 0 and slot 0 for padding."""

    def __init__(
        self,
        options: EngineOptions,
        monkeypatch: Any,
        page_size: int = 1,
        dtype: Any = torch.float32,
        cap: float = 0.0,
        **runner: Any,
    ) -> None:
        import tokenselect.sglang

        for field in dataclasses.fields(options):
            value = getattr(options, field.name)
            if value is not None:
                text = ",".join(map(str, sorted(value))) if field.name == "dense_layers" else str(value)
                monkeypatch.setenv(f"TOKENSELECT_{field.name.upper()}", text)
        self.sequences = Sequences(options, dtype, cap)
        self.size = page_size
        self.pool = fakes.MHATokenToKVPool(160, page_size, dtype, HKV, D, LAYERS, "cpu")
        self.req_to_token = torch.zeros(7, 64, dtype=torch.int32)
        self.runner = SimpleNamespace(
            **{
                "token_to_kv_pool": self.pool,
                "req_to_token_pool": SimpleNamespace(req_to_token=self.req_to_token, size=6),
                "page_size": page_size,
                "use_mla_backend": False,
                "is_draft_worker": False,
                "model_config": SimpleNamespace(is_encoder_decoder=False),
                "kv_index_translator": SimpleNamespace(is_translating=False),
                **runner,
            }
        )
        tokenselect.sglang.register()
        self.backend = fakes.ATTENTION_BACKENDS["tokenselect"](self.runner)
        self.free = (torch.randperm(160 // page_size) + 1).tolist()
        self.rows: dict[str, int] = {}
        self.free_rows = [5, 2, 6, 1, 3, 4]

    def layer(self, layer_id: int, **more: Any) -> Any:
        return SimpleNamespace(
            **{
                "layer_id": layer_id,
                "tp_q_head_num": HQ,
                "tp_k_head_num": HKV,
                "tp_v_head_num": HKV,
                "qk_head_dim": D,
                "v_head_dim": D,
                "scaling": SCALE,
                "logit_cap": self.sequences.cap,
                "logit_capping_method": "tanh",
                "sliding_window_size": -1,
                "is_cross_attention": False,
                "attn_type": SimpleNamespace(value="decoder"),
                "use_irope": False,
                "pos_encoding_mode": "NONE",
                "xai_temperature_len": -1,
                **more,
            }
        )

    def allocate(self, forward: dict[str, int]) -> Any:
        """Slots of new tokens: those of a page lie side by side, pages anywhere."""
        new = []
        for name, count in forward.items():
            row = self.rows.setdefault(name, 0) or self.free_rows.pop()
            self.rows[name] = row
            end = self.sequences.length(name)
            for token in range(end - count, end):
                place = token % self.size
                slot = self.free.pop() * self.size if place == 0 else int(self.req_to_token[row, token - 1]) + 1
                self.req_to_token[row, token] = slot
                new.append(slot)
        return torch.tensor(new)

    def batch(self, forward: dict[str, int], mode: ForwardMode, with_host_lens: bool = True) -> Any:
        slots = self.allocate(forward)
        lens = torch.tensor([self.sequences.length(name) for name in forward])
        counts = list(forward.values())
        is_extend = mode != ForwardMode.DECODE
        return SimpleNamespace(
            forward_mode=mode,
            batch_size=len(forward),
            req_pool_indices=torch.tensor([self.rows[name] for name in forward]),
            seq_lens=lens,
            seq_lens_cpu=lens.clone() if with_host_lens else None,
            out_cache_loc=slots,
            out_cache_loc_is_physical=False,
            encoder_lens=None,
            mha_return_lse=None,
            extend_seq_lens=torch.tensor(counts, dtype=torch.int32) if is_extend else None,
            extend_seq_lens_cpu=counts if is_extend and with_host_lens else None,
        )

    def step(self, forward: dict[str, int], with_host_lens: bool = True, write: bool = True) -> None:
        """One forward in eager mode, compared. Without `write`, somebody else has written keys and values."""
        names = list(forward)
        for name, count in forward.items():
            self.sequences.new(name, count)
        ones = sum(count == 1 for count in forward.values())
        mode = ForwardMode.MIXED if ones else ForwardMode.EXTEND
        mode = ForwardMode.DECODE if ones == len(names) else mode
        batch = self.batch(forward, mode, with_host_lens)
        self.backend.init_forward_metadata(batch)
        # From here on the scheduler may write what it shares.
        kept = self.req_to_token.clone()
        self.req_to_token.fill_(-1)
        batch.seq_lens.fill_(-1)
        batch.req_pool_indices.fill_(-1)
        for layer_id in range(LAYERS):
            q, k, v = self.sequences.latest(names, layer_id)
            layer, packed = self.layer(layer_id), q.reshape(len(q), HQ * D)
            if write:
                out = self.backend.forward(packed, k, v, layer, batch)
            else:
                self.pool.set_kv_buffer(layer, fakes.KVWriteLoc(batch.out_cache_loc), k, v)
                out = self.backend.forward(packed, None, None, layer, batch, save_kv_cache=False)
            assert out.shape == packed.shape
            self.compare(out, names, layer_id)
        self.req_to_token.copy_(kept)

    def compare(self, out: Any, names: list[str], layer: int) -> None:
        expected = self.sequences.expected(names, layer)
        close(out.view(expected.shape), expected, 2e-6 if out.dtype == torch.float32 else 2e-2)
