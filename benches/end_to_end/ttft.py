"""Time to first token: pieces measured at some positions and integrated over the prompt, or all of them run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from clock import Budget, Clock
from model import Attend, Model, NoAttention
from report import EVERYBODY, LINEAR, Report, Row


class Contestant(Protocol):
    """One sequence with an attention of its own; `num_layers` of them have keys and values."""

    name: str
    num_layers: int

    def prefill_at(self, position: int) -> dict[str, Attend]: ...

    def decode_at(self, tokens: int) -> dict[str, Attend]: ...

    def close(self) -> None: ...


@dataclass
class Curve:
    """Milliseconds of a piece of `piece` tokens in all layers, over the position where it begins."""

    piece: int
    layers: int
    millis: dict[int, float] = field(default_factory=dict)
    peak_bytes: dict[int, int] = field(default_factory=dict)

    def at(self, position: int) -> float:
        """On the line through the points next to it."""
        if position in self.millis:
            return self.millis[position]
        before = max(point for point in self.millis if point < position)
        after = min(point for point in self.millis if point > position)
        share = (position - before) / (after - before)
        return (1 - share) * self.millis[before] + share * self.millis[after]

    def covers(self, tokens: int) -> bool:
        """Whether there are points on both ends of a prompt."""
        return bool(self.millis) and min(self.millis) == 0 and max(self.millis) >= tokens - self.piece

    def integral(self, tokens: int) -> float:
        """The sum over the pieces of a prompt."""
        return sum(self.at(position) for position in range(0, tokens, self.piece))

    def points(self, tokens: int) -> int:
        """Measured points in a prompt."""
        return sum(position < tokens for position in self.millis)


def positions_for(lengths: Sequence[int], piece: int) -> list[int]:
    """Where pieces are measured: 0, 1/8, 1/4, 1/2 and 3/4 of each length and its last piece."""
    found = set()
    for tokens in lengths:
        found |= {tokens * eighths // 8 // piece * piece for eighths in (0, 1, 2, 4, 6)} | {tokens - piece}
    return sorted(found)


class Prefill:
    """Measures prompts of one model."""

    def __init__(self, report: Report, clock: Clock, budget: Budget, model: Model, piece: int) -> None:
        self.report, self.clock, self.budget, self.model, self.piece = report, clock, budget, model, piece
        self.hidden = model.embed(model.draw_tokens(piece))

    def ends(self, repeats: int) -> float:
        """Milliseconds of the embedding of a piece, and of the logits of the last token."""
        tokens = self.model.draw_tokens(self.piece)
        return self.clock.pieces(lambda: self.model.logits(self.model.embed(tokens)), repeats, warm=1)

    def run(self, position: int, attend: Attend, layers: int, repeats: int, warm: int = 0) -> float:
        """Milliseconds of a piece in all layers, of which the first `layers` are run."""
        rotation = self.model.rotation(position, self.piece)
        work = lambda: self.model.run_layers(self.hidden, rotation, attend, layers)  # noqa: E731
        return self.clock.pieces(work, repeats, warm) * self.model.shape.num_layers / layers

    def linear(self, layers: int, repeats: int) -> float:
        """Milliseconds of the linear layers, norms and RoPE of a piece."""
        nothing = NoAttention(self.model, self.piece)
        millis = self.run(0, nothing, layers, repeats, warm=1)
        row = Row("piece", EVERYBODY, 0, millis, part=LINEAR, layers=layers, how="measured")
        self.report.add(row)
        return millis

    def curve(
        self, contestant: Contestant, positions: Sequence[int], layers: int, repeats: int, warm_each: bool
    ) -> Curve:
        """Pieces at some positions; those of parts at the second and the last one, for the breakdown."""
        curve, told = Curve(self.piece, layers), {positions[-1], positions[min(1, len(positions) - 1)]}
        for index, position in enumerate(positions):
            what = f"a piece of {contestant.name} at {position}"
            runs = repeats + warm_each
            if not self.budget.allows(what, runs * self._expected_seconds(curve, position)):
                continue
            if self.clock.cuda:
                torch.cuda.reset_peak_memory_stats()
            try:
                stages = contestant.prefill_at(position)
                warm = int(warm_each or index == 0)
                millis = self.run(position, stages.pop("all"), layers, repeats, warm)
            except Exception as error:  # whatever a peer raises
                self.report.skip(what, error)
                break
            curve.millis[position] = millis
            curve.peak_bytes[position] = torch.cuda.max_memory_allocated() if self.clock.cuda else 0
            self.report.add(Row("piece", contestant.name, position, millis, layers=layers, how="measured"))
            for part, attend in stages.items() if position in told else ():
                millis = self.run(position, attend, layers, repeats)
                self.report.add(Row("piece", contestant.name, position, millis, part, layers, "measured"))
        return curve

    def full(self, contestant: Contestant, lengths: Sequence[int]) -> dict[int, float]:
        """Every piece of every layer of the longest prompt, one after the other, planning included: milliseconds to the
        first token of each of the lengths."""
        model, clock = self.model, self.clock
        tokens, times = model.draw_tokens(max(lengths)), {}
        since = clock.start()
        for begin in range(0, max(lengths), self.piece):
            hidden = model.embed(tokens[begin : begin + self.piece])
            attend, rotation = contestant.prefill_at(begin)["all"], model.rotation(begin, self.piece)
            hidden = model.run_layers(hidden, rotation, attend, model.shape.num_layers)
            if begin + self.piece in lengths:
                model.logits(hidden).argmax()
                times[begin + self.piece] = since()
        return times

    def _expected_seconds(self, curve: Curve, position: int) -> float:
        """What a run at `position` will take, by the last one: at most in proportion to the tokens before the end of
        the piece."""
        if not curve.millis:
            return 0.0
        last = max(curve.millis)
        growth = (position + self.piece) / (last + self.piece)
        return curve.millis[last] * growth * curve.layers / self.model.shape.num_layers / 1e3


@dataclass(frozen=True)
class Memory:
    """Bytes that are allocated for keys and values, that a token of all layers needs, and that lie outside of PyTorch's
    allocator."""

    allocated: int
    per_token: int
    workspace: int

    def of(self, peak: int, tokens: int) -> int:
        """A peak of PyTorch's, with the keys and values of a context in place of those that are allocated."""
        return peak - self.allocated + self.per_token * tokens + self.workspace


def report_ttft(
    report: Report, name: str, curve: Curve, ends: float, lengths: Sequence[int], memory: Memory | None
) -> None:
    """A row for each length that the points cover."""
    for tokens in lengths:
        if not curve.covers(tokens):
            report.skip(f"TTFT of {name} at {tokens}", LookupError("not all of its pieces were measured"))
            continue
        how = f"integrated from {curve.points(tokens)} measured pieces, {curve.layers} of {report.num_layers} layers"
        peak = max(bytes for position, bytes in curve.peak_bytes.items() if position < tokens)
        sizes = (memory.of(peak, tokens), memory.workspace) if memory is not None and peak > 0 else (None, None)
        report.add(Row("ttft", name, tokens, curve.integral(tokens) + ends, "all", curve.layers, how, *sizes))
