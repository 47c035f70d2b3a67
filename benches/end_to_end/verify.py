"""Before anything is timed: two layers over a short context give the same attention and logits whoever attends, if
everything is selected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from attention_ours import NAME as OURS
from attention_ours import Ours, Selection
from attention_sdpa import NAME as SDPA
from attention_sdpa import Sdpa
from checks import attention
from clock import Clock
from model import Attend, Model
from paged_cache import PagedCache
from report import Report
from tpot import Step
from ttft import Contestant

FLASHINFER = "FlashInfer"
LAYERS = 2
# Weights and outputs of attention have 8 bits; what comes after passes differences on.
TOLERANCE = 3e-2
# What the results of a step are compared with.
WANTED = {
    "attention": "decode, dense: attention",
    "logits": "decode, dense: logits",
    "logits of a replayed graph": "decode, dense: logits",
}
Maker = Callable[[Model, PagedCache, int], Contestant]


class Reference:
    """Attention in f32 over keys and values in the order of the tokens."""

    name = "reference"

    def __init__(self, model: Model, max_tokens: int, piece: int) -> None:
        size = (LAYERS, max_tokens, model.shape.num_kv_heads, model.shape.head_dim)
        self.k, self.v = (torch.zeros(size, dtype=torch.bfloat16, device=model.device) for _ in "kv")
        self.piece, self.num_layers = piece, LAYERS

    def prefill_at(self, position: int) -> dict[str, Attend]:
        return {"all": self._attend_at(position)}

    def decode_at(self, tokens: int) -> dict[str, Attend]:
        return {"dense": self._attend_at(tokens - 1)}

    def close(self) -> None: ...

    def _attend_at(self, position: int) -> Attend:
        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            end = position + q.shape[0]
            self.k[layer, position:end], self.v[layer, position:end] = k, v
            slots = torch.arange(end, device=q.device)
            out, rows = [], 512  # the f32 logits of all heads are large
            for begin in range(0, q.shape[0], rows):
                part = q[begin : begin + rows]
                seen = position + begin + 1 + torch.arange(len(part), device=q.device)
                out.append(attention(part, self.k[layer], self.v[layer], slots, seen))
            return torch.cat(out).to(q.dtype)

        return attend


class Tap:
    """Keeps the attention of every layer beside passing it on."""

    def __init__(self, attend: Attend) -> None:
        self.attend = attend
        self.outs: list[torch.Tensor] = []

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = self.attend(layer, q, k, v)
        self.outs.append(out.clone())
        return out


class Verify:
    """One prompt in two pieces and the step after it, by everybody."""

    def __init__(self, report: Report, clock: Clock, model: Model, tokens: int) -> None:
        self.report, self.clock, self.model, self.tokens = report, clock, model, tokens
        self.piece = tokens // 2
        self.prompt, self.next = model.draw_tokens(tokens), model.draw_tokens(1)
        # Room for a token more and a page that no prompt ends in.
        self.max_tokens = tokens + 32

    def run(self, flashinfer: Maker | None, selection: Selection) -> set[str]:
        """Everybody beside the reference; answers who runs and agrees."""
        want = self._results(Reference(self.model, self.max_tokens, self.piece))
        everything = replace(selection, top_k=self.tokens)
        makers: dict[str, Callable[[], Contestant]] = {
            OURS: lambda: Ours(self.model, self._cache(), self.piece, everything),
            SDPA: lambda: Sdpa(self.model, self.max_tokens, self.piece, LAYERS),
        }
        if flashinfer is not None:
            makers[FLASHINFER] = lambda: flashinfer(self.model, self._cache(), self.piece)
        agree = set()
        for name, make in makers.items():
            try:
                got = self._results(make())
            except Exception as error:  # whatever a peer raises
                if name == OURS:
                    raise
                self.report.skip(f"{name} beside the reference", error)
                continue
            right = True
            for what, tensors in got.items():
                wanted = want[WANTED[what.split(": ")[1]] if what.startswith("decode") else what]
                right &= self._compare(f"{name}, {what}", tensors, wanted)
            agree |= {name} if right else set()
        return agree

    def _results(self, contestant: Contestant) -> dict[str, list[torch.Tensor]]:
        """Attention of each layer and logits, of the last piece and of the step after it in all ways."""
        model, found = self.model, {}
        for begin in (0, self.piece):
            tap = Tap(contestant.prefill_at(begin)["all"])
            hidden = model.embed(self.prompt[begin : begin + self.piece])
            hidden = model.run_layers(hidden, model.rotation(begin, self.piece), tap, LAYERS)
        found["prefill: attention"], found["prefill: logits"] = tap.outs, [model.logits(hidden)]
        for part, attend in contestant.decode_at(self.tokens + 1).items():
            if "without" in part:
                continue
            tap = Tap(attend)
            step = Step(model, self.tokens, tap, LAYERS)
            step.token.copy_(self.next)
            step()
            outs = list(tap.outs)
            found[f"decode, {part}: attention"], found[f"decode, {part}: logits"] = outs, [step.logits.clone()]
            if self.clock.cuda and not isinstance(contestant, Reference | Sdpa):
                step.attend = attend
                replay = self.clock.graph(step)
                step.logits.zero_()
                replay()
                found[f"decode, {part}: logits of a replayed graph"] = [step.logits.clone()]
        contestant.close()
        return found

    def _cache(self) -> PagedCache:
        return PagedCache(self.model.shape, LAYERS, self.max_tokens, self.model.device)

    def _compare(self, what: str, got: list[torch.Tensor], want: list[torch.Tensor]) -> bool:
        """The largest difference, relative to the largest element."""
        errors = []
        for mine, theirs in zip(got, want, strict=True):
            mine, theirs = mine.float(), theirs.float()
            errors.append(((mine - theirs).abs().max() / theirs.abs().max()).item())
        # Written so that NaN fails.
        ok = all(error < TOLERANCE for error in errors)
        told = ", ".join(f"{error:.1e}" for error in errors)
        return self.report.check(what, ok, f"largest difference {told} of the largest")
