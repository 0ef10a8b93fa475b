"""Seconds and peak memory of computations that are to be compared: measured in one run, taking turns.

On CUDA the clock is the device's own (events) and the memory its allocator's peak; on the CPU the clock is the
process's, and the memory is counted, in a pass of its own, from what torch's profiler records of the allocator.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm

NUM_WARM_UP_STEPS = 2


@dataclass(eq=False)
class Side:
    """One side of a comparison, and what was measured of it."""

    name: str  # for the table
    step: Callable[[], Any]
    units: int | None = None  # its amount of work, to compare with the other side's; None: not counted
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    failure: str | None = None

    @property
    def median(self) -> float | None:
        """Median seconds; None where it failed."""
        return float(np.median(self.seconds)) if self.seconds else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        quartiles = np.percentile(self.seconds, [25, 50, 75]).tolist() if self.seconds else [None] * 3
        names = ("lower_quartile_seconds", "median_seconds", "upper_quartile_seconds")
        values = {"name": self.name, "units": self.units, "peak_bytes": self.peak_bytes, "failure": self.failure}
        return values | dict(zip(names, quartiles, strict=True))


@dataclass(frozen=True)
class Pair:
    """A side and what it is compared with; no reference where only its own time is of interest."""

    side: Side
    reference: Side | None = None

    @property
    def ratio(self) -> float | None:
        """The side's median seconds over the reference's; None where one of them is missing."""
        if self.reference is None or self.side.median is None or self.reference.median is None:
            return None
        return self.side.median / self.reference.median

    @property
    def limit(self) -> float | None:
        """What the ratio is by amount of work; None where that is not counted."""
        if self.reference is None or self.side.units is None or self.reference.units is None:
            return None
        return self.side.units / self.reference.units

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        reference = None if self.reference is None else self.reference.to_dict()
        return {"side": self.side.to_dict(), "reference": reference, "ratio": self.ratio, "limit": self.limit}


def distinct_sides(pairs: Sequence[Pair]) -> list[Side]:
    """The sides of the pairs, each once."""
    return list(dict.fromkeys(side for pair in pairs for side in (pair.side, pair.reference) if side is not None))


def measure(name: str, pairs: Sequence[Pair], device: torch.device, repeats: int) -> None:
    """Times every side of the pairs `repeats` times, in turns, then takes the peak memory of each.

    A side that raises RuntimeError while it warms up (the compiler fails, the memory does not suffice) keeps the reason
    as its `failure`, and the others go on.
    """
    sides = distinct_sides(pairs)
    with tqdm(total=len(sides) * (NUM_WARM_UP_STEPS + repeats + 1), desc=name) as progress:
        for side in sides:
            try:
                for _ in range(NUM_WARM_UP_STEPS):
                    side.step()
            except RuntimeError as error:
                side.failure = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            progress.update(NUM_WARM_UP_STEPS)
        sides = [side for side in sides if side.failure is None]
        for _ in range(repeats):
            for side in sides:
                side.seconds.append(seconds_of(side.step, device))
                progress.update()
        for side in sides:
            side.peak_bytes = peak_memory_of(side.step, device)
            progress.update()


def seconds_of(step: Callable[[], Any], device: torch.device) -> float:
    """How long a call takes on the device."""
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.current_stream(device)
    torch.cuda.synchronize(device)
    start.record(stream)
    step()
    end.record(stream)
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1000


def peak_memory_of(step: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that a call holds at once, beyond what was there before, by torch's allocator."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler prints two lines each time, between the bars
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    # One raw event for each allocation, positive, and each release, negative. The profiler's tables would only tell an
    # operation's balance, in which what it allocates and releases by itself is lost.
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return int(np.cumsum([0, *(event.nbytes() for event in events)]).max())


def table(pairs: Sequence[Pair]) -> str:
    """The pairs as a Markdown table: median seconds and peak memory of both sides, ratio, limit."""
    rows = [
        ("measured", "s", "MiB", "against", "s", "MiB", "ratio", "limit"),
        ("---", "--:", "--:", "---", "--:", "--:", "--:", "--:"),
    ]
    for pair in pairs:
        numbers = ("" if number is None else f"{number:.2f}" for number in (pair.ratio, pair.limit))
        rows.append((*_cells(pair.side), *_cells(pair.reference), *numbers))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)


def _cells(side: Side | None) -> tuple[str, str, str]:
    if side is None:
        return "", "", ""
    if side.median is None:
        return side.name, "failed", ""
    return side.name, f"{side.median:#.3g}", f"{side.peak_bytes / 2**20:,.1f}"
