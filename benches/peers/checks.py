"""Results against attention in f32 and against the published votes."""

import torch


def attention(q, k, v, slots):
    """Attention of one decode row over the tokens at `slots` in f32, one KV head after the other."""
    heads, dim = q.shape[1:]
    group, outputs = heads // k.shape[1], []
    for head in range(k.shape[1]):
        keys, values = k[slots, head].float(), v[slots, head].float()
        queries = q[0, head * group : (head + 1) * group].float()
        outputs.append(torch.softmax(queries @ keys.T * dim**-0.5, dim=-1) @ values)
    return torch.cat(outputs).unsqueeze(0)


def compare_outputs(results, what, got, want):
    """The largest difference, relative to the largest element: bf16 keeps 8 bits, for weights as for outputs."""
    error = (got.float() - want).abs().max() / want.abs().max()
    found = f"largest difference {error:.1e} of the largest"
    results.check(f"{what} against attention in f32", bool(error < 2e-2), found)


def compare_lists(results, what, got, want, votes, size):
    """Two lists may differ in tokens whose votes lie within a thousandth of the k-th."""
    got, want = set(got.tolist()), set(want.tolist())
    kth = torch.topk(votes, size.top_k).values[-1].item()
    differ = [abs(votes[token - size.n_init].item() / kth - 1) for token in got ^ want]
    ok = len(got) == len(want) and all(difference < 1e-3 for difference in differ)
    found = f"{len(got)} tokens, {len(differ)} differ, by up to {max(differ, default=0.0):.1e} of the k-th vote"
    results.check(what, ok, found)
