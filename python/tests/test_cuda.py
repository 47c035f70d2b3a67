"""PyTorch's tensors on a GPU. Skipped, aloud, where there is none."""

from __future__ import annotations

import copy
import gc
import inspect
from typing import Any

import pytest
from test_processes import run

import tokenselect as ts

torch: Any = pytest.importorskip("torch", reason="PyTorch is not installed")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

HQ, HKV, D, PAGE = 8, 2, 64, 16


def config(**fields: Any) -> ts.Config:
    given = dict(num_qo_heads=HQ, num_kv_heads=HKV, head_dim=D, dtype=torch.bfloat16, n_init=16, n_local=16, top_k=4096)
    return ts.Config(**{**given, **fields})


def device() -> ts.Device:
    return ts.Device.cuda(0, stream=torch.cuda.current_stream())


def draw(*shape: int) -> Any:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


class Rows:
    """Keys and values of one sequence in shuffled pages, among each other in vLLM's `[pages, heads, tokens, 2 D]`."""

    def __init__(self, n: int) -> None:
        num_pages = (n + PAGE - 1) // PAGE
        self.n = n
        self.pages = draw(num_pages, HKV, PAGE, 2 * D)
        self.table = torch.randperm(num_pages)
        self.kv = ts.KvView(self.pages[..., :D], self.pages[..., D:], "HND")

    def batch(self, block: int = 1, **more: Any) -> ts.Batch:
        return ts.Batch(PAGE, [0, block], [0, len(self.table)], self.table, [(self.n - 1) % PAGE + 1], **more)

    def attend(self, q: Any) -> Any:
        """Dense causal attention, in f32."""
        rows = self.pages[self.table.cuda()].transpose(1, 2).reshape(-1, HKV, 2 * D)[: self.n].float()
        k, v = (x.repeat_interleave(HQ // HKV, dim=1) for x in (rows[..., :D], rows[..., D:]))
        logits = torch.einsum("thd,jhd->htj", q.float(), k) * D**-0.5
        block = len(q)
        hidden = torch.ones(block, self.n, dtype=torch.bool, device="cuda").triu(self.n - block + 1)
        return torch.einsum("htj,jhd->thd", logits.masked_fill(hidden, float("-inf")).softmax(-1), v)


def close(got: Any, want: Any) -> None:
    assert (got.float() - want).abs().max() <= 1e-2 * want.abs().max()


def context(where: ts.Device, block: int = 1, **fields: Any) -> ts.Context:
    return ts.Context(where, config(**fields), max_rows=1, max_block_len=block, max_kv_tokens=8192)


@pytest.mark.parametrize("block", [1, 33, 300])
def test_a_step_over_pages_of_pytorch(block: int) -> None:
    rows, ctx = Rows(1000), context(device(), block)
    batch = rows.batch(block)
    fused = draw(block, HQ + 2 * HKV, D)
    q, k, v = fused[:, :HQ], fused[:, HQ : HQ + HKV], fused[:, HQ + HKV :]
    ctx.append_select(batch, rows.kv, q, k, v)
    out, lse = ctx.attend(batch, rows.kv, q, lse=True)
    close(out, rows.attend(q))
    assert lse.shape == (block, HQ) and len(ctx.selected()) == 1000
    written = rows.pages[rows.table.cuda()].transpose(1, 2).reshape(-1, HKV, 2 * D)[1000 - block : 1000]
    assert torch.equal(written, torch.cat([k, v], -1))


def test_fewer_tokens_are_those_of_the_processor() -> None:
    rows, q = Rows(3000), draw(1, HQ, D)
    chosen = []
    for where, place in ((device(), "cuda"), (ts.Device.cpu(), "cpu")):
        pages = rows.pages.to(place)
        kv = ts.KvView(pages[..., :D], pages[..., D:], "HND")
        ctx = context(where, top_k=256)
        ctx.select(rows.batch(), kv, q.to(place))
        chosen.append(set(ctx.selected()))
    assert len(chosen[0]) == len(chosen[1]) == 16 + 256 + 16 + 1
    # Votes are the same but for rounding: few tokens are so near the last one that is chosen.
    assert len(chosen[0] & chosen[1]) >= 285


@pytest.mark.parametrize("own_stream", [False, True])
def test_temporaries_are_read_before_they_go(own_stream: bool) -> None:
    where = ts.Device.cuda(0) if own_stream else device()
    rows, ctx = Rows(4096), context(where, 4096)
    batch = rows.batch(4096)
    x = draw(4096, HKV, D)
    torch.cuda.synchronize()
    for i in range(20):
        given = x + i
        torch.cuda.synchronize()
        ctx.append(batch, rows.kv, given, given)
        del given
        draw(4096, HKV, D).fill_(-1)  # takes the memory that has come free
    where.synchronize()
    torch.cuda.synchronize()
    keys = rows.pages[rows.table.cuda()].transpose(1, 2).reshape(-1, HKV, 2 * D)[..., :D]
    assert torch.equal(keys, x + 19)


def test_a_graph_of_pytorch() -> None:
    rows, q = Rows(2000), draw(1, HQ, D)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        where = device()
        ctx = context(where)
        slot = ts.BatchSlot(where, rows.batch(), 256)
        batch = slot.put(rows.batch())
        k, v, out = draw(1, HKV, D), draw(1, HKV, D), torch.empty_like(q)

        def step() -> None:
            ctx.append_select(batch, rows.kv, q, k, v)
            ctx.attend(batch, rows.kv, q, out=out)

        step()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step()
        for n in (2000, 1000, 1999):
            rows.n = n
            q.copy_(draw(1, HQ, D))
            table = rows.table[: (n + PAGE - 1) // PAGE]
            slot.put(ts.Batch(PAGE, [0, 1], [0, len(table)], table, [(n - 1) % PAGE + 1]))
            graph.replay()
            stream.synchronize()
            close(out, rows.attend(q))


def test_another_gpu_or_the_processor_is_refused() -> None:
    rows, ctx = Rows(100), context(device())
    with pytest.raises(ValueError, match="`q` must be on cuda:0, it is on cpu"):
        ctx.select(rows.batch(), rows.kv, draw(1, HQ, D).cpu())


@pytest.mark.parametrize("rows, padding", [(1, 0), (3, 7)])
def test_transformers(rows: int, padding: int) -> None:
    transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed")
    from tokenselect.transformers import TokenSelectCache, TokenSelectOptions, configure

    shape = transformers.LlamaConfig(
        vocab_size=97, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, initializer_range=0.1, tie_word_embeddings=False,
    )  # fmt: skip
    models = {}
    for name, dtype in (("exact", torch.float32), ("eager", torch.bfloat16), ("tokenselect", torch.bfloat16)):
        torch.manual_seed(1)
        attention = "eager" if name == "exact" else name
        model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(shape), attn_implementation=attention)
        models[name] = model.eval().to("cuda", torch.bfloat16).to(dtype)
    configure(models["tokenselect"], TokenSelectOptions(top_k=4096))
    cache_name = (
        "cache" if "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters else "past_key_values"
    )
    ids = torch.randint(3, 97, (rows, 600), device="cuda")
    mask = torch.ones_like(ids)
    if padding:
        mask[1, :padding] = 0
    logits = {}
    with torch.no_grad():
        for name, model in models.items():
            ours = name == "tokenselect"
            cache = TokenSelectCache(model.config) if ours else transformers.DynamicCache(config=model.config)
            parts, begin = [], 0
            for end in [590, *range(591, 601)]:  # a prompt, and steps of one token
                given = {"attention_mask": mask[:, :end], cache_name: cache, "use_cache": True}
                parts.append(model(ids[:, begin:end], **given).logits.float())
                begin = end
            logits[name] = torch.cat(parts, 1)
        exact = logits.pop("exact")
        errors = {name: ((x - exact).abs() * mask[..., None]).max() for name, x in logits.items()}
        assert errors["tokenselect"] <= 1.5 * errors["eager"] < 0.1 * exact.abs().max()
        text = models["tokenselect"].generate(
            ids, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0
        )
    assert text.shape == (rows, 620)


def test_forked_child_is_told() -> None:
    """CUDA's contexts do not live on in it."""
    lines = run("""
device = ts.Device.cuda(0)
buffer = device.to_device(np.arange(4, dtype=np.float32))

def work():
    print(told(buffer.numpy))
    print(told(lambda: ts.Device.cuda(0)))
    print(told(device.synchronize), flush=True)

in_child(work)
print(buffer.numpy().tolist())
""")
    gone = "was made in the process that this one was forked from"
    assert lines == [
        f"`buffer` {gone}",
        "`device` cannot be made where the process that this one was forked from made one",
        f"`device` {gone}",
        "[0.0, 1.0, 2.0, 3.0]",
    ]


def test_collections_leave_captures_alone() -> None:
    """The garbage collector asks what a device has read; within a capture of PyTorch's that must not end it."""
    rows, stream = Rows(100), torch.cuda.Stream()
    own = ts.Device.cuda(0)  # of another stream, so that it keeps what it was given
    ctx = context(own)
    q = draw(1, HQ, D)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        ctx.select(rows.batch(), rows.kv, q)
        graph, x = torch.cuda.CUDAGraph(), torch.zeros(4, device="cuda")
        with torch.cuda.graph(graph, stream=stream):
            gc.collect()
            x += 1
        graph.replay()
        stream.synchronize()
    assert x.tolist() == [1.0] * 4
    own.synchronize()
    assert not own._num_kept
