"""Who sits where: free slots, prefixes, followers, moves, and leaving; over a cache without a model."""

import pytest
import torch

from llama.cache import KVCache
from llama.rows import Row
from llama.sampling import Sampling
from llama.slots import Slots, common_prefix


@pytest.fixture
def slots() -> Slots:
    """Four slots; a key of slot s at position p is 100 s + p."""
    k = torch.zeros(1, 4, 1, 64, 1) + torch.arange(64).view(1, 1, 1, 64, 1) + 100 * torch.arange(4).view(1, 4, 1, 1, 1)
    return Slots(KVCache(k, -k, ids=[[] for _ in range(4)], running=set()))


@pytest.fixture
def row(tokenizer):
    def make(prompt: list[int], **options) -> Row:
        return Row(prompt, Sampling(**options).checked(), tokenizer, room=64 - len(prompt))

    return make


def through(slots: Slots, *chosen: int) -> None:
    """Pretend that prompts were computed."""
    for slot in chosen:
        slots.cache.ids[slot] = list(slots.rows[slot].prompt)


@pytest.mark.parametrize(
    ("held", "ids", "expected"),
    [
        ([], [1], 0),
        ([1, 2, 3], [1, 2, 4], 2),
        ([1, 2], [1, 2, 3], 2),
        ([1, 2, 3], [1, 2], 2),
        ([5], [1], 0),
    ],
)
def test_common_prefix(held, ids, expected):
    assert common_prefix(held, ids) == expected


def test_rows_enter_in_the_order_of_their_arrival(slots, row):
    rows = [row([1, n]) for n in range(3, 9)]
    for one in rows:
        slots.queue([one])
    slots.enter()
    assert set(slots.rows) == set(rows[:4]) and slots.waiting == rows[4:]
    assert slots.cache.running == {0, 1, 2, 3}

    leaving = slots.rows.index(rows[1])
    slots.leave(leaving)
    slots.enter()
    assert slots.rows[leaving] is rows[4] and slots.waiting == rows[5:]


def test_longest_prompts_sit_lowest(slots, row):
    """Then what is left after a pass over the first positions of all is slots side by side."""
    rows = [row([1] * length) for length in (3, 9, 5)]
    for one in rows:
        slots.queue([one])
    slots.enter()
    assert [one and len(one.prompt) for one in slots.rows] == [9, 5, 3, None]


def test_a_prompt_takes_the_slot_that_holds_most_of_it(slots, row):
    slots.cache.ids = [[1, 5, 6, 7], [1, 5, 9, 9, 9], [2, 2], [1, 5, 6, 7, 8]]
    slots.queue([row([1, 5, 6, 7, 8, 9, 10])])
    slots.enter()
    assert slots.rows[3] is not None and slots.cache.ids[3] == [1, 5, 6, 7, 8]
    slots.queue([row([1, 5, 9, 4])])
    slots.enter()
    assert slots.rows[1] is not None and slots.cache.ids[1] == [1, 5, 9]
    assert slots.cache.ids[0] == [1, 5, 6, 7]


def test_the_last_id_of_a_prompt_is_computed_again(slots, row):
    slots.cache.ids[2] = [1, 5, 6, 7]
    slots.queue([row([1, 5, 6])])
    slots.enter()
    assert slots.rows[2] is not None and slots.cache.ids[2] == [1, 5]


def test_a_prompt_that_is_scored_goes_on_from_nothing(slots, row):
    slots.cache.ids[0] = [1, 5, 6, 7]
    slots.queue([row([1, 5, 6, 7], echo=True, logprobs=True)])
    slots.enter()
    assert slots.cache.ids[slots.rows.index(next(filter(None, slots.rows)))] == []


def test_a_stranger_takes_the_slot_that_was_free_longest(slots, row):
    for n in range(4):
        slots.queue([row([1, 10 + n])])
    slots.enter()
    through(slots, 0, 1, 2, 3)
    for slot in (2, 0, 3, 1):
        slots.leave(slot)
    for expected in (2, 0, 3, 1):
        slots.queue([row([7, 8, 9])])
        slots.enter()
        through(slots, expected)
        slots.leave(expected)
        slots.cache.ids[expected] = [1, 10 + expected]


def test_followers_get_the_keys_of_their_leader(slots, row):
    rows = [row([1, 5, 6]) for _ in range(6)]
    slots.queue(rows)
    slots.enter()
    assert sum(one is not None for one in slots.rows) == 1
    through(slots, 0)
    assert slots.join(0) == [1, 2, 3]
    assert slots.rows == rows[:4] and slots.waiting == rows[4:]
    for slot in (1, 2, 3):
        assert slots.cache.k[0, slot, 0, :4, 0].tolist() == [0, 1, 2, 100 * slot + 3]
        assert slots.cache.ids[slot] == [1, 5, 6]


def test_followers_wait_for_a_slot_if_their_leader_leaves(slots, row):
    rows = [row([1, 5, 6]) for _ in range(3)]
    slots.queue(rows)
    slots.enter()
    slots.fail(0, ValueError("of this row alone"))
    assert rows[0].error is not None and slots.waiting == rows[1:] and slots.followers == {}


def test_rows_move_where_a_quarter_of_the_span_is_idle(slots, row):
    rows = [row([1, n, 7]) for n in range(4)]
    for one in rows:
        slots.queue([one])
    slots.enter()
    through(slots, 0, 1, 2, 3)
    slots.leave(1)
    slots.leave(2)
    slots.draw_together()
    assert slots.rows == [rows[0], rows[3], None, None]
    assert slots.cache.k[0, 1, 0, :4, 0].tolist() == [300, 301, 302, 103]
    assert slots.cache.ids[:2] == [rows[0].prompt, rows[3].prompt] and slots.cache.running == {0, 1}


def test_rows_do_not_move_into_prompts_that_are_not_through(slots, row):
    for n in range(4):
        slots.queue([row([1, n, 7])])
    slots.enter()
    through(slots, 0, 3)
    before = list(slots.rows)
    slots.draw_together()
    assert slots.rows == before


def test_a_row_alone_stays_where_it_is(slots, row):
    for n in range(4):
        slots.queue([row([1, n, 7])])
    slots.enter()
    through(slots, 0, 1, 2, 3)
    for slot in (0, 1, 2):
        slots.leave(slot)
    slots.draw_together()
    assert slots.rows[3] is not None


def test_cancelled_rows_leave_wherever_they_are(slots, row):
    seated = [row([1, n]) for n in range(4)]
    waiting = [row([2, 2]), row([2, 2]), row([3, 3])]
    for one in seated:
        slots.queue([one])
    slots.queue(waiting[:2])
    slots.queue(waiting[2:])
    slots.enter()
    slots.drop([seated[2], *waiting[:2]])
    assert [one.finish_reason for one in (seated[2], *waiting[:2])] == ["cancelled"] * 3
    assert slots.rows.count(None) == 1 and slots.waiting == waiting[2:] and slots.followers.get(waiting[0]) is None
    assert seated[0].finish_reason is None


def test_a_failed_row_leaves_a_wiped_slot(slots, row):
    slots.queue([row([1, 5])])
    slots.enter()
    through(slots, 0)
    slots.fail(0, RuntimeError("spoiled"))
    assert slots.cache.k[:, 0].count_nonzero() == 0 and slots.cache.ids[0] == [] and slots.cache.running == set()
