"""`Slots`: which row of text sits in which row of the cache, who enters next, and who leaves.

The cache notes, for each slot, the ids whose keys the slot holds. So what is left to compute of a row is its context
beyond these ids, and a new row has the least to compute in the free slot that holds the longest beginning of its
prompt. This module knows neither the model nor how ids are chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

from llama.cache import KVCache, Versions
from llama.rows import Row

WORTH_SHARING = (
    16  # first ids of a prompt: a free slot that holds at least as many is always taken for it
)


def common_prefix(held: Sequence[int], ids: Sequence[int]) -> int:
    """How many first ids agree."""
    limit = min(len(held), len(ids))
    for n in range(limit):
        if held[n] != ids[n]:
            return n
    return limit


class Slots:
    """The rows of a cache, each with the row of text that sits in it, and the queue before them.

    `followers` are rows of a call whose prompt equals that of another of its rows. They wait for that row: once its
    prompt is through, its keys are copied to them.
    """

    def __init__(self, cache: KVCache):
        self.cache = cache
        self.weights: Versions | None = None  # of which the keys are
        size = len(cache.ids)
        self.rows: list[Row | None] = [None] * size
        self.waiting: list[Row] = []
        self.followers: dict[Row, list[Row]] = {}

        # When each slot was taken and freed last, by a clock that counts such events.
        self.clock = 0
        self.taken = [0] * size
        self.freed = [0] * size

    def free_slots(self) -> list[int]:
        """The slots without a row, least recently freed first."""
        free = [slot for slot, row in enumerate(self.rows) if row is None]
        return sorted(free, key=lambda slot: self.freed[slot])

    def seated(self) -> list[int]:
        """The slots with a row."""
        return [slot for slot, row in enumerate(self.rows) if row is not None]

    def is_through(self, slot: int) -> bool:
        """Whether the slot holds the whole prompt of its row."""
        held = self.cache.ids[slot]
        return len(held) >= len(self.rows[slot].prompt)

    def filling(self) -> list[int]:
        """The slots whose prompt is not through, the one that was taken first in front."""
        slots = [slot for slot in self.seated() if not self.is_through(slot)]
        return sorted(slots, key=lambda slot: self.taken[slot])

    def running(self) -> list[int]:
        """The slots whose prompt is through."""
        return [slot for slot in self.seated() if self.is_through(slot)]

    def everybody(self) -> list[Row]:
        """The rows that sit, wait, or follow another."""
        rows = [self.rows[slot] for slot in self.seated()]
        rows += self.waiting
        for group in self.followers.values():
            rows += group
        return rows

    # --- what slots hold ---

    def use(self, cache: KVCache) -> None:
        """Sit in this cache from now on. Rows that sat in another have lost their keys, and fail."""
        if cache is self.cache:
            return
        for slot in self.seated():
            advice = "move it when none is open"
            self.fail(slot, RuntimeError(f"The model was moved during a call; {advice}."))
        self.cache = cache

    def forget_others(self, weights: Versions) -> None:
        """Let no new row go on from keys of other weights, which were trained or replaced since."""
        if weights == self.weights:
            return
        for slot in self.free_slots():
            self.cache.ids[slot].clear()
        if not self.seated():  # else those will leave such keys behind
            self.weights = weights

    # --- entering ---

    def queue(self, rows: Sequence[Row]) -> None:
        """Let rows of equal prompts wait: the first for a slot, the others for the first."""
        leader, *followers = rows
        self.waiting.append(leader)
        self.followers[leader] = followers

    def enter(self) -> None:
        """Give free slots to waiting rows, in the order of their arrival.

        A slot that holds the beginning of a row's prompt goes to that row. The other rows get the least recently
        freed slots, the longest prompt the lowest: prompts that are not through after a pass then lie side by side.
        """
        free = self.free_slots()
        entering = self.waiting[: len(free)]
        del self.waiting[: len(free)]

        strangers = []
        for row in entering:
            slot = self.holder(row, free)
            if slot is None:
                strangers.append(row)
            else:
                self.seat(row, slot)
                free.remove(slot)

        strangers.sort(key=lambda row: -len(row.prompt))
        lowest = sorted(free[: len(strangers)])
        for row, slot in zip(strangers, lowest, strict=True):
            self.seat(row, slot)

    def holder(self, row: Row, free: list[int]) -> int | None:
        """The free slot that holds the longest beginning of a row's prompt; None if that is too short to matter."""
        shared = [self.sharable(slot, row) for slot in free]
        longest = max(shared)
        if longest == 0 or longest < min(WORTH_SHARING, len(row.prompt) // 2):
            return None
        return free[shared.index(longest)]

    def sharable(self, slot: int, row: Row) -> int:
        """How many ids of a slot the row's prompt can go on from: never all, as the last one's logits are needed."""
        if row.scores_prompt:
            return 0
        return common_prefix(self.cache.ids[slot], row.prompt[:-1])

    def seat(self, row: Row, slot: int) -> None:
        """Put a row into a slot, which keeps the ids that both have at their beginning."""
        shared = self.sharable(slot, row)
        del self.cache.ids[slot][shared:]
        self.take(row, slot)

    def take(self, row: Row, slot: int) -> None:
        self.rows[slot] = row
        self.cache.running.add(slot)
        self.clock += 1
        self.taken[slot] = self.clock

    def join(self, slot: int) -> list[int]:
        """Seat the followers of this slot's row, with copies of its prompt's keys; return their slots.

        Those for whom no slot is free wait, first in the queue.
        """
        leader = self.rows[slot]
        followers = self.followers.pop(leader, [])
        free = sorted(self.free_slots()[: len(followers)])

        for row, target in zip(followers, free, strict=False):
            self.cache.copy(slot, target, len(leader.prompt))
            self.take(row, target)

        self.waiting[:0] = followers[len(free) :]
        return free

    def draw_together(self) -> None:
        """Move the last running rows into gaps between the others while a quarter of the span, or more, is idle.

        A move costs one reading and writing of a row's keys; an idle slot costs its share of every step to come.
        """
        while slots := self.running():
            first = slots[0]
            last = slots[-1]
            gaps = [slot for slot in range(first, last) if self.rows[slot] is None]
            span = last - first + 1
            if not gaps or 4 * len(slots) > 3 * span:
                return

            self.cache.copy(last, gaps[0], len(self.cache.ids[last]))
            self.take(self.rows[last], gaps[0])
            self.clear(last)

    # --- leaving ---

    def clear(self, slot: int) -> None:
        """Free a slot; its keys stay, for a prompt that begins with the same ids."""
        self.rows[slot] = None
        self.cache.running.discard(slot)
        self.clock += 1
        self.freed[slot] = self.clock

    def leave(self, slot: int) -> None:
        """Let an ended row go. Rows that waited for its prompt now wait for a slot themselves."""
        row = self.rows[slot]
        self.clear(slot)
        self.waiting[:0] = self.followers.pop(row, [])

    def fail(self, slot: int, error: Exception) -> None:
        """End a slot's row with an error, and wipe the slot: what is in it may be spoiled."""
        row = self.rows[slot]
        self.cache.wipe(slot)
        if row is not None:
            row.fail(error)
            self.leave(slot)

    def drop(self, rows: Sequence[Row]) -> None:
        """End cancelled rows wherever they are."""
        for row in rows:
            row.end("cancelled")

        for leader, group in self.followers.items():
            self.followers[leader] = [row for row in group if not row.ended]
        for slot in self.seated():
            if self.rows[slot].ended:
                self.leave(slot)

        for row in [row for row in self.waiting if row.ended]:
            self.waiting.remove(row)
            self.waiting[:0] = self.followers.pop(row, [])
