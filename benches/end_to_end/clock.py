"""Times of pieces of a prompt and of decoding steps on the device, and a limit on the time that all of it takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from timing import SLEEP_CYCLES

Work = Callable[[], object]


class Clock:
    """Milliseconds between CUDA events; on the processor, where the program is only tested, by the wall."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def start(self) -> Callable[[], float]:
        """Begins to count; what is answered waits for the device and tells the milliseconds until then."""

        def wait() -> float:
            if self.cuda:
                torch.cuda.current_stream().synchronize()
            return time.perf_counter() * 1e3

        begin = wait()
        return lambda: wait() - begin

    def once(self, work: Work) -> float:
        """One run. The GPU waits a little until the host is ahead of it."""
        if not self.cuda:
            began = time.perf_counter()
            work()
            return (time.perf_counter() - began) * 1e3
        torch.cuda._sleep(SLEEP_CYCLES)
        begin, end = event(), event()
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def pieces(self, work: Work, repeats: int, warm: int = 0) -> float:
        """The median of some runs, after `warm` that do not count."""
        return statistics.median([self.once(work) for _ in range(warm + repeats)][warm:])

    def steps(self, replay: Work, repeats: int) -> float:
        """The median of runs right after each other, as in decoding: the host runs ahead, the first run does not
        count."""
        if not self.cuda:
            return self.pieces(replay, min(repeats, 2))
        torch.cuda._sleep(SLEEP_CYCLES)
        events = [event()]
        events[0].record()
        for _ in range(repeats + 1):
            replay()
            events.append(event())
            events[-1].record()
        events[-1].synchronize()
        times = [begin.elapsed_time(end) for begin, end in zip(events[1:], events[2:], strict=False)]
        return statistics.median(times)

    def graph(self, work: Work) -> Work:
        """`work` in a CUDA graph: it runs once outside, then is captured in the current stream. On the processor the
        work itself."""
        work()
        if not self.cuda:
            return work
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            work()
        graph.replay()
        torch.cuda.synchronize()
        return graph.replay


def event() -> torch.cuda.Event:
    """An event that has a time."""
    return torch.cuda.Event(enable_timing=True)


class Budget:
    """Seconds that may be spent."""

    def __init__(self, seconds: float | None, skip: Callable[[str, Exception], None]) -> None:
        self.seconds, self.skip, self.began = seconds, skip, time.perf_counter()

    @property
    def spent(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self.began

    def allows(self, what: str, seconds: float) -> bool:
        """Whether work of about so many seconds still fits; says so where it does not."""
        if self.seconds is None or self.spent + seconds <= self.seconds:
            return True
        text = f"about {seconds:.1f} s, and {max(self.seconds - self.spent, 0):.1f} s of the budget are left"
        self.skip(what, TimeoutError(text))
        return False
