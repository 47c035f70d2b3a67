"""One decode row: every operation and whole steps, next to those of peers."""

import tokenselect as ts
import torch
from checks import attention, compare_lists, compare_outputs, compare_votes
from context import Context
from published import Published, fastest
from timing import synchronize


class Ours:
    """This library over one context, `config` with a Selection Cache that always reuses."""

    def __init__(self, device, size, context, q):
        config = ts.Config(
            num_qo_heads=size.hq, num_kv_heads=size.hkv, head_dim=size.dim, dtype="bf16", n_init=size.n_init,
            n_local=size.n_local, top_k=size.top_k, selection_cache=1, similarity_threshold=-1.0, max_reuse=2**32 - 2,
        )  # fmt: skip
        self.ctx = ts.Context(device, config, max_rows=1, max_block_len=1, max_kv_tokens=context.num_places)
        self.cached = ts.SelectionCache(device, config, num_layers=1, num_sequences=1)
        pages, last_page_len = context.pages, [context.last_page_len]
        self.batch = ts.Batch(size.page, [0, 1], [0, pages.numel()], pages, last_page_len, sequence_indices=[0])
        self.q, self.kv, self.out = q, ts.KvView(*context.paged(size.page)), torch.empty_like(q)

    def score(self):
        self.ctx.score(self.batch, self.kv)

    def top_k(self):
        self.ctx.top_k(self.batch)

    def select(self):
        self.ctx.select(self.batch, self.kv, self.q)

    def select_reused(self):
        self.ctx.select(self.batch, self.kv, self.q, selection_cache=self.cached, layer=0)

    def attend(self):
        return self.ctx.attend(self.batch, self.kv, self.q, out=self.out)

    def attend_dense(self):
        return self.ctx.attend_dense(self.batch, self.kv, self.q, out=self.out)

    def step(self):
        self.select()
        self.attend()

    def step_reused(self):
        self.select_reused()
        self.attend()

    def votes(self, size, num_candidates):
        """A copy of the votes of the candidates."""
        return self.ctx.workspace("votes").torch()[size.n_init : size.n_init + num_candidates].clone()


def decoders(results, q, k, v, pages, last_page_len, what):
    """FlashInfer's decode with and without tensor cores, as far as they run: `{name: callable}`."""
    found = {}
    for name, tensor_cores in [("FlashInfer", False), ("FlashInfer, tensor cores", True)]:
        try:
            from flashinfer_peer import Decode

            decode = Decode(q, k, v, pages, last_page_len, tensor_cores)
            decode()
            synchronize(q)
            found[name] = decode
        except Exception as error:  # whatever a peer raises
            results.skip(f"{name}, {what}", error)
    return found


def flashinfer_top_k(results, votes, k):
    """FlashInfer's top-k, if it runs and chooses the same votes."""
    try:
        from flashinfer_peer import top_k

        chosen = votes[top_k(votes, k)].sort().values
    except Exception as error:  # whatever a peer raises
        return results.skip("FlashInfer top_k", error)
    results.check("FlashInfer top_k against torch.topk", *same(chosen, torch.topk(votes, k).values.sort().values))
    return lambda votes: top_k(votes, k)


def same(got, want):
    differ = int((got != want).sum())
    return differ == 0, f"{differ} votes differ"


def compare(results, ours_device, size, tokens, k, v):
    """All measurements over one context."""
    generator = torch.Generator().manual_seed(tokens)
    q = torch.randn(1, size.hq, size.dim, generator=generator).bfloat16().to(k.device)
    context = Context(size, tokens, k, v, generator)
    k, v, slots = context.k, context.v, context.slots
    num_candidates = tokens - 1 - size.n_local - size.n_init

    ours = Ours(ours_device, size, context, q)
    make = lambda choice: Published(q, k, slots, size.n_init, num_candidates, size.top_k, choice)  # noqa: E731
    published = make(fastest(results, make))

    # The same answers first.
    ours.select()
    votes, chosen = ours.votes(size, num_candidates), torch.tensor(ours.ctx.selected(0))
    theirs = published.select()
    reference = published.vote()
    compare_votes(results, f"votes over {tokens} tokens", votes, reference)
    compare_lists(results, f"lists over {tokens} tokens", chosen, theirs, reference, size)
    chosen_slots = slots[chosen.to(k.device)].contiguous()
    want = attention(q, k, v, chosen_slots.long())
    compare_outputs(results, "attend", ours.attend(), want)
    sparse = decoders(results, q, *context.paged(1), chosen_slots, 1, "page size 1")
    for name, decode in sparse.items():
        compare_outputs(results, f"{name} over the list", decode(), want)
    want = attention(q, k, v, slots.long())
    compare_outputs(results, "attend_dense", ours.attend_dense(), want)
    pages, what = context.pages.to(k.device), f"page size {size.page}"
    dense = decoders(results, q, *context.paged(size.page), pages, context.last_page_len, what)
    for name, decode in dense.items():
        compare_outputs(results, f"{name} over all tokens", decode(), want)
    radix = flashinfer_top_k(results, votes, size.top_k)
    ours.select_reused()
    ours.step_reused()
    stats = ours.cached.stats()
    results.check("reuse of a selection", (stats.scored, stats.reused) == (1, 1), f"{stats.scored}, {stats.reused}")

    # Bytes: inputs read once, outputs written once.
    token = 2 * size.hkv * size.dim
    vectors = 2 * 2 * size.hq * size.dim
    listed = size.n_init + size.top_k + size.n_local + 1
    keys = num_candidates * token
    measure = results.measure
    ours.select()
    measure("score", "tokenselect", tokens, keys + 4 * num_candidates * size.hq, ours.score)
    measure("score", "published (Triton)", tokens, keys + 4 * num_candidates * size.hq, published.score)
    ours.select()  # votes to choose from
    measure("top_k", "tokenselect", tokens, 4 * (num_candidates + listed), ours.top_k)
    in_torch = lambda: torch.topk(votes, size.top_k, sorted=False)  # noqa: E731
    measure("top_k", "torch.topk", tokens, 4 * (num_candidates + size.top_k), in_torch)
    measure("select", "tokenselect", tokens, keys + 4 * listed, ours.select)
    measure("select", "published", tokens, keys + 4 * listed, published.select)
    if radix:
        measure("top_k", "FlashInfer", tokens, 4 * (num_candidates + size.top_k), lambda: radix(votes))
        with_radix = lambda: published.select(radix)  # noqa: E731
        measure("select", "published, FlashInfer top_k", tokens, keys + 4 * listed, with_radix)
    ours.select()
    measure("attend", "tokenselect", tokens, 2 * listed * token + vectors, ours.attend)
    for name, decode in sparse.items():
        measure("attend", name, tokens, 2 * listed * token + vectors, decode)
    measure("dense", "tokenselect", tokens, 2 * tokens * token + vectors, ours.attend_dense)
    for name, decode in dense.items():
        measure("dense", name, tokens, 2 * tokens * token + vectors, decode)
    step = keys + (2 * listed - size.top_k) * token + vectors
    measure("step", "tokenselect", tokens, step, ours.step)
    for name, decode in sparse.items():

        def published_step(decode=decode):
            # `plan` has kept this tensor, so that the next run reads the list that was just made.
            torch.index_select(slots, 0, published.select(), out=chosen_slots)
            decode()

        measure("step", f"published, {name}", tokens, step, published_step)
    measure("step reused", "tokenselect", tokens, 2 * listed * token + vectors, ours.step_reused)
    stats = ours.cached.stats()
    results.check("every timed step has reused", stats.scored == 1, f"{stats.scored} scored, {stats.reused} reused")
