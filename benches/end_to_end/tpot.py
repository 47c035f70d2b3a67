"""Time per output token: a CUDA graph of a whole step of one sequence, all that is around attention included."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attention_ours import NAME as OURS
from attention_ours import Ours
from attention_sdpa import Sdpa
from clock import Budget, Clock, Work
from model import Attend, Model, NoAttention
from report import EVERYBODY, LINEAR, Report, Row
from timing import Timer
from ttft import Contestant


class Step:
    """A decoding step of the token at `position`: embedding, layers, logits, and the largest of them as the next
    token."""

    def __init__(self, model: Model, position: int, attend: Attend, layers: int) -> None:
        self.model, self.attend, self.layers = model, attend, layers
        self.rotation = model.rotation(position, 1)
        self.token = model.draw_tokens(1)
        self.next = torch.zeros_like(self.token)
        self.logits = torch.empty(model.shape.vocabulary, dtype=torch.bfloat16, device=model.device)

    def __call__(self) -> None:
        hidden = self.model.run_layers(self.model.embed(self.token), self.rotation, self.attend, self.layers)
        self.logits.copy_(self.model.logits(hidden))
        torch.argmax(self.logits, dim=0, keepdim=True, out=self.next)


class Decode:
    """Measures steps of one model."""

    def __init__(self, report: Report, clock: Clock, budget: Budget, model: Model, repeats: int) -> None:
        self.report, self.clock, self.budget, self.model, self.repeats = report, clock, budget, model, repeats
        self.ends, self.linear = 0.0, 0.0

    def measure_linear(self, layers: int) -> None:
        """The step without attention, and what is in no layer."""
        nothing = NoAttention(self.model, 1)
        self.ends = self._millis(Step(self.model, 0, nothing, 0))
        millis = self._millis(Step(self.model, 0, nothing, layers))
        self.linear = self._all_layers(millis, layers)
        how = self._how(layers)
        self.report.add(Row("step", EVERYBODY, 0, self.linear, LINEAR, layers, how))
        self.report.add(Row("step", EVERYBODY, 0, self.ends, "embedding and logits alone", 0, how))

    def measure(self, contestant: Contestant, lengths: Sequence[int]) -> None:
        """Every way of a contestant at every length."""
        for tokens in lengths:
            try:
                if isinstance(contestant, Sdpa):
                    self._one_layer(contestant, tokens)
                else:
                    self._whole(contestant, tokens)
            except Exception as error:  # whatever a peer raises
                self.report.skip(f"TPOT of {contestant.name} at {tokens}", error)

    def _whole(self, contestant: Contestant, tokens: int) -> None:
        """Graphs of all layers that the contestant has."""
        if not self.budget.allows(f"TPOT of {contestant.name} at {tokens}", 3.0):
            return
        if self.clock.cuda:
            torch.cuda.reset_peak_memory_stats()
        layers, found = contestant.num_layers, {}
        for part, attend in contestant.decode_at(tokens).items():
            millis = self._all_layers(self._millis(Step(self.model, tokens - 1, attend, layers)), layers)
            metric = "step" if "without" in part else "tpot"
            found[part] = millis
            workspace = contestant.decode_workspace if isinstance(contestant, Ours) else None
            how = self._how(layers)
            self.report.add(Row(metric, contestant.name, tokens, millis, part, layers, how, workspace_bytes=workspace))
        if isinstance(contestant, Ours):
            self._check_reuse(contestant, tokens)
            best = min("anew", "dense", key=lambda part: found[part])
            row = Row("tpot", OURS, tokens, found[best], "default policy", layers, f"the better of both: {best}")
            self.report.add(row)

    def _one_layer(self, contestant: Sdpa, tokens: int) -> None:
        """The attention of one layer, after reading what flushes the L2, for all layers, and the linear part."""
        if not self.budget.allows(f"TPOT of {contestant.name} at {tokens}", 1.0):
            return
        attend, given = contestant.decode_at(tokens)["dense"], contestant.heads(1)
        micros, _ = Timer(self.model.device)(lambda: attend(0, *given))
        millis = self.linear + micros / 1e3 * self.model.shape.num_layers
        how = f"linear part + attention of 1 of {self.model.shape.num_layers} layers, {contestant.backend}"
        self.report.add(Row("tpot", contestant.name, tokens, millis, "dense", 1, how))

    def _check_reuse(self, contestant: Ours, tokens: int) -> None:
        """Whether each layer was scored once and then reused, unless it had nothing to choose."""
        stats = contestant.cached.stats()
        found = f"{stats.scored} scored, {stats.reused} reused, {stats.complete} complete"
        ok = stats.scored <= contestant.num_layers and (stats.reused > 0 or stats.complete > 0)
        self.report.check(f"reused selections at {tokens}", ok, found)

    def _millis(self, step: Step) -> float:
        replay: Work = self.clock.graph(step)
        return self.clock.steps(replay, self.repeats)

    def _all_layers(self, millis: float, layers: int) -> float:
        return self.ends + (millis - self.ends) * self.model.shape.num_layers / layers

    def _how(self, layers: int) -> str:
        graph = "CUDA graph" if self.clock.cuda else "no graph"
        return f"{graph}, {layers} of {self.model.shape.num_layers} layers, median of {self.repeats}"
