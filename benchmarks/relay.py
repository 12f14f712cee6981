"""Two training loops that take turns, so that a busy machine is as busy for the one as for the other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter, process_time


@dataclass(frozen=True)
class Timing:
    """Microseconds per step, by the wall clock and by the processor time of the whole process."""

    wall_us: float
    cpu_us: float


class Runner:
    """One side of a relay; its loop calls `tick` when a batch begins.

    Args:
        block_steps: Steps that a side does before it hands over.
        warmup_blocks: Blocks at the start that do not count.
        blocks: Blocks that count.
        goes_first: Whether this side runs the first block.
    """

    def __init__(self, block_steps: int, warmup_blocks: int, blocks: int, *, goes_first: bool) -> None:
        self.block_steps = block_steps
        self.last = block_steps * (warmup_blocks + blocks)
        self.partner: Runner
        self._warmup = block_steps * warmup_blocks
        self._goes_first = goes_first
        self._gone = False
        self._turn = threading.Semaphore(0)
        self._wall_s = self._cpu_s = 0.0
        self._began_wall_s = self._began_cpu_s = 0.0

    def run(self, loop: Loop) -> None:
        """Run the loop; however it ends, the partner does not wait for its turn any more."""
        try:
            loop(self.tick)
        finally:
            self._gone = True
            self.partner._turn.release()

    def tick(self, batch_idx: int) -> None:
        """Costs a step inside a block one division, the same on both sides."""
        if batch_idx % self.block_steps == 0:
            self._hand_over(batch_idx)

    def _hand_over(self, batch_idx: int) -> None:
        wall_s, cpu_s = perf_counter(), process_time()
        if batch_idx > self._warmup:
            self._wall_s += wall_s - self._began_wall_s
            self._cpu_s += cpu_s - self._began_cpu_s
        if batch_idx > 0:
            self.partner._turn.release()
        waits = batch_idx > 0 or not self._goes_first
        if waits and not self.partner._gone:
            self._turn.acquire()
        self._began_wall_s, self._began_cpu_s = perf_counter(), process_time()

    @property
    def timing(self) -> Timing:
        steps = self.last - self._warmup
        return Timing(1e6 * self._wall_s / steps, 1e6 * self._cpu_s / steps)


Loop = Callable[[Callable[[int], None]], None]


def race(
    first: Loop, second: Loop, block_steps: int, warmup_blocks: int, blocks: int
) -> tuple[Timing, Timing]:
    """Run two loops that take turns, each in a new thread, never both at a time.

    Both get new threads, since the main one allocates from a heap that every import has left its marks on:
    the same loop was seen to be 6% slower there. Each gets its `tick`, and has to train one batch more than
    it is timed for.
    """
    one = Runner(block_steps, warmup_blocks, blocks, goes_first=True)
    two = Runner(block_steps, warmup_blocks, blocks, goes_first=False)
    one.partner, two.partner = two, one
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(one.run, first), pool.submit(two.run, second)]
    for run in runs:
        run.result()
    return one.timing, two.timing
