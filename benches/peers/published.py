"""The selection of the TokenSelect paper as its released code does it (Triton for the dot products, PyTorch for the
rest), with the definitions of this project: KV head `h // G`, scale `1 / sqrt(D)`, f32 logits."""

import torch
import triton
import triton.language as tl

# (tokens, warps) of a program; the fastest is taken.
CHOICES = [(32, 4), (64, 4), (64, 8), (128, 4), (128, 8)]


@triton.jit
def paged_dot(
    q, k, slots, logits, num_candidates, n_init, stride_slot, scale, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`logits[h, j] = scale * q[h] . k[slots[n_init + j], h // GROUP]`: a program for each query head and block."""
    head = tl.program_id(0)
    candidate = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = candidate < num_candidates
    slot = tl.load(slots + n_init + candidate, mask=inside, other=0).to(tl.int64)
    dims = tl.arange(0, D)
    query = tl.load(q + head * D + dims).to(tl.float32)
    places = k + slot[:, None] * stride_slot + (head // GROUP) * D + dims[None, :]
    keys = tl.load(places, mask=inside[:, None], other=0.0).to(tl.float32)
    products = tl.sum(keys * query[None, :], axis=1) * scale
    tl.store(logits + head.to(tl.int64) * num_candidates + candidate, products, mask=inside)


class Published:
    """Buffers and launch shape for one context.

    `q` is `[T, num_qo_heads, D]`; a block of several tokens is scored by its mean query. `k` is `[slots, num_kv_heads, D]`,
    `slots` int32 `[n]`: where each token lies. The candidates are `[n_init, n_init + num_candidates)`, the tokens after them are
    the local window and the block.
    """

    def __init__(self, q, k, slots, n_init, num_candidates, top_k, choice=CHOICES[0]):
        self.q, self.k, self.slots, self.choice = q, k, slots, choice
        self.n_init, self.num_candidates, self.top_k = n_init, num_candidates, top_k
        heads = q.shape[1]
        self.logits = torch.empty(heads, num_candidates, dtype=torch.float32, device=q.device)
        self.initial = torch.arange(n_init, device=q.device)
        self.local = torch.arange(n_init + num_candidates, slots.numel(), device=q.device)

    def score(self):
        """The dot products of every query head."""
        heads, dim = self.q.shape[1:]
        block, warps = self.choice
        query = self.q if self.q.shape[0] == 1 else self.q.mean(dim=0, dtype=torch.float32)
        paged_dot[(heads, triton.cdiv(self.num_candidates, block))](
            query, self.k, self.slots, self.logits, self.num_candidates, self.n_init, self.k.stride(0), dim**-0.5,
            GROUP=heads // self.k.shape[1], D=dim, BLOCK=block, num_warps=warps,
        )  # fmt: skip
        return self.logits

    def vote(self):
        """Softmax of each head over the candidates, summed over heads."""
        return torch.softmax(self.logits, dim=-1).sum(dim=0)

    def assemble(self, chosen):
        """The ascending list of tokens, windows included."""
        chosen = torch.sort(chosen).values + self.n_init
        return torch.cat([self.initial, chosen, self.local])

    def select(self, top_k=None):
        """The whole selection; `top_k(votes)` in place of `torch.topk`."""
        self.score()
        votes = self.vote()
        chosen = torch.topk(votes, self.top_k, sorted=False).indices if top_k is None else top_k(votes)
        return self.assemble(chosen)


def fastest(results, make):
    """The launch shape with which the published dot product is fastest."""
    times = {}
    for choice in CHOICES if results.timer.cuda else CHOICES[:1]:
        try:
            times[choice] = results.timer(make(choice).score)[0]
        except Exception as error:  # one that does not compile
            results.skip(f"paged_dot with {choice}", error)
    return min(times, key=times.get)
