"""A block of a prompt by itself, and the blocks of a piece, next to dense attention of peers and the published selection."""

import cudnn_peer
import tokenselect as ts
import torch
from checks import attention, compare_lists, compare_outputs, compare_votes
from context import Context
from published import Published, fastest
from timing import synchronize

# A piece takes a peer up to half a second.
PIECE_REPEATS = 7
WORKSPACE_BYTES = 4 << 30
BACKENDS = {"FlashInfer FA2": "fa2", "FlashInfer FA3": "fa3"}
DENSE_PEERS = (*BACKENDS, cudnn_peer.NAME)


class Ours:
    """This library for the last tokens of a context, those of `q`, `[T, num_qo_heads, D]`: one block, or several in a step."""

    def __init__(self, device, size, context, q):
        config = ts.Config(
            num_qo_heads=size.hq, num_kv_heads=size.hkv, head_dim=size.dim, dtype="bf16", n_init=size.n_init,
            n_local=size.prefill_local, top_k=size.top_k,
        )  # fmt: skip
        pages, places = context.pages, context.num_places
        self.batch = ts.Batch(size.page, [0, len(q)], [0, len(pages)], pages, [context.last_page_len])
        if len(q) == size.block:
            self.ctx = ts.Context(device, config, max_rows=1, max_block_len=len(q), max_kv_tokens=places)
        else:
            self.batch = self.batch.in_blocks(size.block)
            self.ctx = ts.Context.for_prefill(
                device, config, block_len=size.block, max_kv_len=places, max_piece_len=len(q),
                max_workspace_bytes=WORKSPACE_BYTES,
            )  # fmt: skip
        self.q, self.kv, self.out = q, ts.KvView(*context.paged(size.page)), torch.empty_like(q)

    def select(self):
        self.ctx.select(self.batch, self.kv, self.q)

    def attend(self):
        return self.ctx.attend(self.batch, self.kv, self.q, out=self.out)

    def attend_dense(self):
        return self.ctx.attend_dense(self.batch, self.kv, self.q, out=self.out)

    def step(self):
        self.select()
        self.attend()

    def votes(self, block, begin, end):
        """The votes of a block for the tokens `[begin, end)`."""
        base = self.batch.row(block).token_base
        return self.ctx.workspace("votes").torch()[base + begin : base + end]


class Last:
    """The last tokens of a context, whose queries are `q`: a "block" or a "piece" of several."""

    def __init__(self, name, size, context, q):
        self.name, self.size, self.context, self.q = name, size, context, q
        self.num_blocks = len(q) // size.block
        self.begin = context.tokens - len(q)
        # Queries that are checked.
        self.rows = [0, len(q) // 2 + size.block // 3, len(q) - 1]

    def published(self, block, choice=None):
        """The published selection for one of the blocks."""
        size, context = self.size, self.context
        before = self.begin + block * size.block
        q = self.q[block * size.block : (block + 1) * size.block]
        slots = context.slots[: before + size.block]
        num_candidates = before - size.prefill_local - size.n_init
        more = () if choice is None else (choice,)
        return Published(q, context.k, slots, size.n_init, num_candidates, size.top_k, *more)

    def dense(self):
        """Attention in f32 of the rows that are checked."""
        seen = torch.tensor(self.rows, device=self.q.device) + self.begin + 1
        context = self.context
        return attention(self.q[self.rows], context.k, context.v, context.slots.long(), seen)

    def sparse(self, lists):
        """The same over the lists of their blocks."""
        context, block_len, outputs = self.context, self.size.block, []
        for row in self.rows:
            tokens = lists[row // block_len].to(self.q.device)
            seen = torch.tensor([len(tokens) - block_len + row % block_len + 1], device=self.q.device)
            slots = context.slots[tokens].long()
            outputs.append(attention(self.q[row : row + 1], context.k, context.v, slots, seen))
        return torch.cat(outputs)

    def bytes(self):
        """Bytes of `select`, `attend`, `step` and `dense` over all blocks: the keys of the context once for selections, each list
        once, queries and outputs once."""
        size, token = self.size, 2 * self.size.hkv * self.size.dim
        vectors = 2 * 2 * self.q.numel()
        listed = self.num_blocks * (size.n_init + size.top_k + size.prefill_local + size.block)
        select = self.context.tokens * token + vectors // 2 + 4 * listed
        attend = 2 * listed * token + vectors
        return dict(select=select, attend=attend, step=select + attend, dense=2 * self.context.tokens * token + vectors)


def draw_queries(size, generator):
    """Queries of a piece. Those of a block have a direction in common, so that their mean looks for something."""
    shape = (size.piece // size.block, size.block, size.hq, size.dim)
    noise = torch.randn(*shape, generator=generator)
    common = torch.randn(shape[0], 1, *shape[2:], generator=generator)
    return (noise + common).flatten(0, 1).bfloat16()


def check_ours(results, last, ours):
    """Votes, lists and attention over them of some blocks; answers the lists."""
    size, tokens, lists = last.size, last.context.tokens, {}
    ours.select()
    for block in sorted({row // size.block for row in last.rows}):
        what = f"{last.name} over {tokens} tokens, block {block}"
        published = last.published(block)
        theirs, votes = published.select(), published.vote()
        lists[block] = torch.tensor(ours.ctx.selected(block))
        got = ours.votes(block, size.n_init, size.n_init + published.num_candidates)
        compare_votes(results, f"votes, {what}", got, votes)
        compare_lists(results, f"lists, {what}", lists[block], theirs, votes, size)
    compare_outputs(results, f"attend, {last.name}", ours.attend()[last.rows], last.sparse(lists))
    return lists


def agreeing(results, last, what, makers, want):
    """The peers that run and whose outputs are right: `{name: callable}`."""
    found = {}
    for name, make in makers.items():
        try:
            peer = make()
            rows = peer()[last.rows]
            synchronize(rows)
        except Exception as error:  # whatever a peer raises
            results.skip(f"{name}, {what}", error)
            continue
        if compare_outputs(results, f"{name}, {what}", rows, want):
            found[name] = peer
    return found


def flashinfer(q, kv, pages, last_page_len):
    """What makes FlashInfer's attention over `pages`, for each of its backends."""

    def maker(backend):
        def make():
            from flashinfer_peer import Prefill

            return Prefill(q, *kv, pages, last_page_len, backend)

        return make

    return {name: maker(backend) for name, backend in BACKENDS.items()}


def dense_peers(results, last, in_order):
    """Dense attention of peers, over pages and over keys and values that lie `in_order`."""
    context, page = last.context, last.size.page
    pages = context.pages.to(last.q.device)
    makers = flashinfer(last.q, context.paged(page), pages, context.last_page_len)
    makers[cudnn_peer.NAME] = lambda: cudnn_peer.Prefill(last.q, *in_order)
    return agreeing(results, last, f"dense, {last.name}", makers, last.dense())


def measure_block(results, device, last, in_order):
    """A block by itself: ours, the published path, and dense attention."""
    tokens, num_bytes = last.context.tokens, last.bytes()
    ours = Ours(device, last.size, last.context, last.q)
    tokens_of_list = check_ours(results, last, ours)[0]
    compare_outputs(results, "attend_dense, block", ours.attend_dense()[last.rows], last.dense())
    slots = last.context.slots[tokens_of_list.to(last.q.device)].contiguous()
    makers = flashinfer(last.q, last.context.paged(1), slots, 1)
    sparse = agreeing(results, last, "over the list, block", makers, last.sparse({0: tokens_of_list}))
    dense = dense_peers(results, last, in_order)
    published = last.published(0, fastest(results, lambda choice: last.published(0, choice)))

    def measure(operation, peer, work):
        results.measure(f"block {operation}", peer, tokens, num_bytes[operation], work)

    for operation in ("select", "attend", "step"):
        measure(operation, "tokenselect", getattr(ours, operation))
    measure("dense", "tokenselect", ours.attend_dense)
    measure("select", "published", published.select)
    for name, attend in sparse.items():

        def published_step(attend=attend):
            # `plan` has kept this tensor, so that the next run reads the list that was just made.
            torch.index_select(last.context.slots, 0, published.select(), out=slots)
            attend()

        measure("attend", name, attend)
        measure("step", f"published, {name}", published_step)
    for name, attend in dense.items():
        measure("dense", name, attend)


def measure_piece(results, device, last, in_order):
    """The blocks of a piece in one step, and dense attention of the piece, both told for one block."""
    tokens, num_bytes = last.context.tokens, last.bytes()
    ours = Ours(device, last.size, last.context, last.q)
    check_ours(results, last, ours)
    dense = dense_peers(results, last, in_order)

    def measure(operation, peer, work):
        what = (f"piece {operation}", peer, tokens, num_bytes[operation], work)
        results.measure(*what, parts=last.num_blocks, repeats=PIECE_REPEATS)

    for operation in ("select", "attend", "step"):
        measure(operation, "tokenselect", getattr(ours, operation))
    for name, attend in dense.items():
        measure("dense", name, attend)


def speed_up(results, what, tokens, peers=DENSE_PEERS):
    """How many times faster a step of a "block" or of a "piece" is than the fastest dense attention of `peers`, or None."""
    theirs, ours = results.fastest(f"{what} dense", peers, tokens), results.us(f"{what} step", "tokenselect", tokens)
    return theirs / ours if theirs and ours else None


def compare(results, device, size, tokens, k, v):
    """All measurements over one context."""
    generator = torch.Generator().manual_seed(tokens)
    q = draw_queries(size, generator).to(k.device)
    context = Context(size, tokens, k, v, generator)
    in_order = context.in_order()
    measure_block(results, device, Last("block", size, context, q[-size.block :]), in_order)
    measure_piece(results, device, Last("piece", size, context, q), in_order)
    for what in ("block", "piece"):
        if times := speed_up(results, what, tokens):
            print(f"{what} over {tokens} tokens: {times:.2f} times faster than the fastest dense peer", flush=True)
