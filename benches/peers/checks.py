"""Results against attention in f32 and against the published votes."""

import torch


def attention(q, k, v, slots, seen=None):
    """Attention of queries `[T, num_qo_heads, D]` over the tokens at `slots`, all of them or the first `seen`, `[T]`, in f32,
    one KV head after the other."""
    heads, dim = q.shape[1:]
    group, outputs = heads // k.shape[1], []
    for head in range(k.shape[1]):
        keys, values = k[slots, head].float(), v[slots, head].float()
        queries = q[:, head * group : (head + 1) * group].float()
        logits = queries @ keys.T * dim**-0.5
        if seen is not None:
            unseen = torch.arange(len(slots), device=q.device) >= seen[:, None]
            logits.masked_fill_(unseen[:, None], -torch.inf)
        outputs.append(torch.softmax(logits, dim=-1) @ values)
    return torch.cat(outputs, dim=1)


def compare_outputs(results, what, got, want):
    """Whether outputs agree: the largest difference, relative to the largest element, as bf16 keeps 8 bits, for weights as for
    outputs."""
    error = (got.float() - want).abs().max() / want.abs().max()
    found = f"largest difference {error:.1e} of the largest"
    return results.check(f"{what} against attention in f32", bool(error < 2e-2), found)


def compare_lists(results, what, got, want, votes, size):
    """Two lists may differ in tokens whose votes lie within a thousandth of the k-th."""
    got, want = set(got.tolist()), set(want.tolist())
    kth = torch.topk(votes, size.top_k).values[-1].item()
    differ = [abs(votes[token - size.n_init].item() / kth - 1) for token in got ^ want]
    ok = len(got) == len(want) and all(difference < 1e-3 for difference in differ)
    found = f"{len(got)} tokens, {len(differ)} differ, by up to {max(differ, default=0.0):.1e} of the k-th vote"
    results.check(what, ok, found)


def compare_votes(results, what, got, want):
    """The largest difference, relative to the largest vote."""
    error = ((got - want).abs().max() / want.max()).item()
    results.check(what, error < 1e-3, f"largest difference {error:.1e} of the largest")
