"""`Engine`: rows of text run through a model, and enter and leave between any two steps.

A step has two passes, each of them one call of the model. The first computes the next tokens of prompts that are not
through yet, if there are any: enough of them to be worth a pass, and few enough not to stall the rows that run. The
second computes the next token of every running row.

This module knows neither what a token means nor HTTP.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from llama import parallel
from llama.cache import Window, versions
from llama.device import dtype_name
from llama.model import Transformer
from llama.rows import Alternatives, Row
from llama.sampling import adjust, choose, log_probs, top_log_probs
from llama.slots import Slots

PREFILL_TOKENS = 2048  # tokens of all rows in one pass over prompts: bounds the activations
PREFILL_BESIDE = 512  # the same while other rows are running, who wait for the pass
SHORTEST_PASS = 64  # positions in one pass, unless fewer are left: shorter ones cost as much
SCORED_LOGITS = 2**24  # logits of prompt tokens held at once: 64 MB in float32
LEAVES = -1  # sent by the first rank in place of an id: the row was cancelled there
FAILED = -2  # in place of an id: the row's logits_processor raised an error on the first rank

# From ids (B, 1), their positions (B,) and their window of the cache to logits (B, 1, V).
Step = Callable[[Tensor, Tensor, Window], Tensor]


class Engine:
    """Takes in the rows of any calls, and computes one token of each running row a step.

    `submit` and `cancel` may be called from any thread. `step` computes; `follow` calls it for whoever waits for rows,
    one thread at a time. `vocabulary` is how many ids the tokenizer knows: others are never chosen. `compiled` is a
    step that torch compiled, called with 1, 2, 4, ... rows and powers of two of positions only.

    At several ranks the same calls are made on each, by one thread; the first rank's ids and cancellations count.
    """

    def __init__(self, model: Transformer, vocabulary: int, compiled: Step | None = None):
        self.model = model
        self.vocabulary = vocabulary
        self.compiled = compiled

        self.slots = Slots(model.own_cache())
        # Rows that any thread submitted since the last step, in lists of rows with equal prompts.
        self.submitted: deque[list[Row]] = deque()

        self.changed = threading.Condition()
        self.driver: int | None = None  # the thread that computes a step now
        self.thread: int | None = None

    # --- for callers ---

    def submit(self, rows: Sequence[Row]) -> None:
        """Queue rows of one call. Equal prompts among them are computed once."""
        self.check_thread()
        groups: dict[tuple, list[Row]] = {}

        for row in rows:
            if not row.ended and not row.scores_prompt:
                row.begin()
            if not row.ended:
                scored = (row.scores_prompt, row.scores_prompt and row.options.top_logprobs)
                groups.setdefault((*scored, *row.prompt), []).append(row)

        self.submitted.extend(groups.values())

    def follow(self, rows: Sequence[Row]) -> Iterator[None]:
        """Yield whenever some of the rows may have pieces, until all have ended. Raises a row's error.

        Of the threads that wait here, one computes steps for all rows of the engine, and the others sleep until it has
        done one. The caller has to cancel its rows at the end, so that none is left behind.
        """
        while True:
            ended = all(row.ended for row in rows)
            for row in rows:
                if row.error is not None:
                    raise row.error
            yield
            if ended:
                return
            self.wait_for(rows)

    def wait_for(self, rows: Sequence[Row]) -> None:
        """Compute steps, or wait for the thread that does, until one of the rows has something new.

        Raises `RuntimeError` inside a step, whose end the thread that computes it cannot wait for.
        """
        caller = threading.get_ident()
        with self.changed:
            while not self.have_news(rows):
                if self.driver == caller:
                    advice = "a logits_processor or hook has to use another one"
                    raise RuntimeError(f"The model was called inside its own step; {advice}.")
                if self.driver is not None:
                    self.changed.wait()
                    continue

                try:
                    self.driver = caller
                    self.changed.release()
                    self.step()
                finally:
                    self.driver = None  # first: Ctrl-C may end the waiting for the others
                    self.changed.acquire()
                    self.changed.notify_all()

    def have_news(self, rows: Sequence[Row]) -> bool:
        """Whether there is something for whoever follows the rows: pieces, an error, or the end of them all."""
        if any(row.pieces or row.error is not None for row in rows):
            return True
        return all(row.ended for row in rows)

    def cancel(self, rows: Sequence[Row]) -> None:
        """Have rows leave that have not ended: at once, or after the step that another thread is computing.

        At several ranks they leave with the next step that the first rank takes, which tells the others.
        """
        for row in rows:
            row.cancelled = not row.ended

        with self.changed:
            if self.driver is not None:
                return
            if parallel.size() == 1:
                self.drop_cancelled()
            for slot, row in enumerate(self.slots.rows):
                if row is not None and row.cancelled:
                    self.slots.cache.running.discard(slot)

    def check_thread(self) -> None:
        """Raise `RuntimeError` if, at several ranks, another thread called before: ranks would meet out of order."""
        if parallel.size() == 1:
            return
        caller = threading.get_ident()
        if self.thread is None:
            self.thread = caller
        if self.thread != caller:
            raise RuntimeError(
                "At several ranks one thread calls the model; this is another one than before."
            )

    # --- one step ---

    @torch.no_grad()
    def step(self) -> None:
        """Let rows leave and enter, run one pass over prompts if any is left, then one token of each running row.

        A row whose prompt comes through has its first token from that pass, and the second from the next step.
        """
        self.drop_cancelled()
        self.slots.use(self.model.own_cache())
        if self.slots.waiting and self.slots.free_slots():
            self.slots.forget_others(versions(self.model))
        self.slots.enter()
        self.slots.draw_together()

        running = self.slots.running()
        filling = self.next_prompts()
        if filling:
            self.attempt(filling, self.prefill)
        if running:
            self.attempt(running, self.decode)

    def drop_cancelled(self) -> None:
        """Queue the submitted rows, so that the cancelled ones are among those of the slots; then drop these.

        At several ranks `agree` drops them, when the first rank says so.
        """
        for _ in range(len(self.submitted)):
            self.slots.queue(self.submitted.popleft())

        if parallel.size() == 1:
            cancelled = [row for row in self.slots.everybody() if row.cancelled]
            if cancelled:
                self.slots.drop(cancelled)

    def attempt(self, slots: list[int], work: Callable[[list[int]], None]) -> None:
        """Run some work on slots; if it raises, the rows in them fail, and others go on."""
        try:
            work(slots)
        except Exception as error:  # memory that does not suffice, a compiler that gives up
            for slot in slots:
                self.slots.fail(slot, error)

    # --- prompts ---

    def next_prompts(self) -> list[int]:
        """Slots side by side whose prompts are not through and can go on from about the same position.

        They are those around the slot that was taken first.
        """
        filling = self.slots.filling()
        if not filling:
            return []

        first = filling[0]
        chosen = [first]
        for direction in (-1, 1):
            slot = first + direction
            while slot in filling and self.go_together(first, slot):
                chosen.append(slot)
                slot += direction
        return sorted(chosen)

    def go_together(self, one: int, other: int) -> bool:
        """Whether two slots' prompts share a pass: computing again what one already holds must not cost more."""
        held = self.slots.cache.ids
        rows = self.slots.rows
        alike = rows[one].scores_prompt == rows[other].scores_prompt
        return alike and abs(len(held[one]) - len(held[other])) < SHORTEST_PASS

    def prefill(self, slots: list[int]) -> None:
        """Run the next tokens of some prompts; choose the first id of each that is through.

        Prompts are padded on the right. Padding comes after a row's last token, so no token sees it, and the row's
        next tokens take its place in the cache.
        """
        cache = self.slots.cache
        rows = [self.slots.rows[slot] for slot in slots]
        scoring = rows[0].scores_prompt
        begin = min(len(cache.ids[slot]) for slot in slots)
        end = begin + self.pass_length([len(row.prompt) - begin for row in rows], scoring)

        # One pass, with logits where a prompt ends, or everywhere if its tokens are to be scored.
        padded = [row.prompt[begin:end] + row.prompt[-1:] * (end - len(row.prompt)) for row in rows]
        tokens = self.tensor(padded)
        last = self.tensor([min(len(row.prompt), end) - 1 - begin for row in rows])
        window = cache.window(slots[0], len(slots), end)
        logits = self.model(tokens, begin, cache=window, logits_at=None if scoring else last)
        if scoring:
            self.score(rows, begin, logits)
            logits = logits[torch.arange(len(rows), device=logits.device), last]  # (B, V)

        # Whose prompt is through, and who has the same prompt, goes on.
        through: dict[int, int] = {}  # from a slot to its place in the logits
        for index, (slot, row) in enumerate(zip(slots, rows, strict=True)):
            cache.ids[slot] = row.prompt[: max(end, len(cache.ids[slot]))]
            if end < len(row.prompt):
                continue
            for seated in (slot, *self.slots.join(slot)):
                self.slots.rows[seated].scores = row.scores
                if self.begin(seated):
                    through[seated] = index
        if through:
            self.choose(list(through), logits[list(through.values())])

    def pass_length(self, left: list[int], scoring: bool) -> int:
        """How many positions the next pass over prompts has, `left` of which each still needs."""
        others_run = len(self.slots.running()) > 0
        most = PREFILL_BESIDE if others_run else PREFILL_TOKENS
        if scoring:
            most = min(most, SCORED_LOGITS // self.model.vocab_size)

        until_first_ends = max(min(left), SHORTEST_PASS)
        return min(max(left), until_first_ends, max(1, most // len(left)))

    def score(self, rows: list[Row], begin: int, logits: Tensor) -> None:
        """Note the log-probability of each prompt token that follows one of this pass; `logits` is (B, T, V)."""
        for row, of_row in zip(rows, logits, strict=True):
            targets = row.prompt[begin + 1 : begin + 1 + len(of_row)]
            if targets:
                of_row = of_row[: len(targets)]
                now = slice(begin + 1, begin + 1 + len(targets))  # a neighbour may be behind
                row.scores.logprobs[now] = log_probs(of_row, self.tensor(targets)).tolist()
                row.scores.top[now] = self.alternatives(of_row, row.options.top_logprobs)

    def begin(self, slot: int) -> bool:
        """Let a row whose prompt was scored give it out; return whether the row goes on."""
        row = self.slots.rows[slot]
        if not row.scores_prompt:
            return True

        for position, logprob in enumerate(row.scores.logprobs):
            if not math.isfinite(logprob):
                self.slots.fail(slot, self.not_finite(row, position - 1))
                return False

        row.begin()
        if row.ended:
            self.slots.leave(slot)
        return not row.ended

    # --- running rows ---

    def decode(self, slots: list[int]) -> None:
        """Feed each row's last id, and choose the next.

        The pass covers all slots from the first to the last of them. Any other slot between them is fed an id that
        it holds, at the position where it holds it, which changes nothing; a slot that holds none is fed id 0.
        """
        held = self.slots.cache.ids
        contexts = {slot: self.slots.rows[slot].context for slot in slots}
        longest = max(len(context) for context in contexts.values())
        first, count = self.span(slots)

        ids = []
        positions = []
        for slot in range(first, first + count):
            known = contexts.get(slot) or held[slot] or [0]
            position = min(len(known), longest) - 1
            ids.append([known[position]])
            positions.append(position)

        logits = self.run(self.tensor(ids), positions, first, count)  # (B, V)
        for slot, context in contexts.items():
            held[slot][len(context) - 1 :] = context[-1:]
        if len(slots) < count:
            logits = logits[[slot - first for slot in slots]]
        self.choose(slots, logits)

    def span(self, slots: list[int]) -> tuple[int, int]:
        """The first slot of a step and how many follow: a power of two of them where the step is compiled."""
        first = slots[0]
        count = slots[-1] - first + 1
        if self.compiled is not None:
            count = min(power_of_two(count), len(self.slots.rows))
            first = min(first, len(self.slots.rows) - count)
        return first, count

    def run(self, tokens: Tensor, positions: list[int], first: int, count: int) -> Tensor:
        """Logits (B, V) of one token a slot: eager over what is filled, or by the compiled step."""
        length = max(positions) + 1

        if self.compiled is not None:
            length = min(power_of_two(length), self.model.params.max_seq_len)
            window = self.slots.cache.window(first, count, length)
            return self.compiled(tokens, self.tensor(positions), window)[:, 0]

        window = self.slots.cache.window(first, count, length)
        if len(set(positions)) == 1:  # no row has to skip a key
            return self.model(tokens, positions[0], cache=window)[:, 0]
        return self.model(tokens, positions=self.tensor(positions), cache=window)[:, 0]

    # --- choosing ---

    def choose(self, slots: list[int], logits: Tensor) -> None:
        """Give each row the id that its options choose from its logits (B, V), the first rank's on all ranks."""
        rows = [self.slots.rows[slot] for slot in slots]
        known = logits[
            :, : self.vocabulary
        ]  # ids that the tokenizer lacks have no text: never chosen
        failures: dict[int, Exception] = {}

        # Choose.
        if any(row.options.changes_logits() for row in rows):
            known = self.adjusted(known, rows, failures)
        ids = choose(known, [row.options for row in rows], [row.next_uniform() for row in rows])
        ids = self.agree(ids, rows, failures)

        # Note what the model itself says of the chosen, and wait for the device once.
        logprobs = torch.zeros_like(logits[:, 0])
        if any(row.options.logprobs for row in rows):
            logprobs = log_probs(logits, ids.clamp(min=0))
        finite = logits.isfinite().all(-1)
        facts = torch.stack(
            (ids.float(), logprobs, finite.float())
        ).tolist()  # ids are exact to 2^24
        top = self.alternatives(logits, max(row.options.top_logprobs for row in rows))

        # Let the rows take it.
        for index, (slot, row) in enumerate(zip(slots, rows, strict=True)):
            id, logprob, is_finite = (fact[index] for fact in facts)
            if not is_finite:
                self.slots.fail(slot, self.not_finite(row, len(row.context) - 1))
            elif id == FAILED:
                reason = RuntimeError("The first rank's logits_processor failed.")
                self.slots.fail(slot, failures.get(index, reason))
            elif id == LEAVES:
                self.slots.drop([row])
            else:
                row.add(int(id), logprob, top[index][: row.options.top_logprobs])
                if row.ended:
                    self.slots.leave(slot)

    def adjusted(self, known: Tensor, rows: list[Row], failures: dict[int, Exception]) -> Tensor:
        """Logits as each row's processor, bias and penalties change them; an error of a processor is noted."""
        adjusted = known.clone()
        for index, row in enumerate(rows):
            if not row.options.changes_logits():
                continue
            try:
                adjusted[index] = adjust(known[index], row.options, row.context, row.generated)
            except Exception as error:
                failures[index] = error
        return adjusted

    def agree(self, ids: Tensor, rows: list[Row], failures: dict[int, Exception]) -> Tensor:
        """The first rank's ids on all ranks, and in the same message which rows failed there or were cancelled."""
        for index in failures:
            ids[index] = FAILED
        if parallel.size() == 1:
            return ids

        for index, row in enumerate(rows):
            if row.cancelled:
                ids[index] = LEAVES
        queue = list(self.slots.waiting)
        codes = self.tensor([LEAVES if row.cancelled else 0 for row in queue])
        sent = parallel.broadcast(torch.cat((ids, codes)))

        if queue:
            codes = sent[len(rows) :].tolist()
            self.slots.drop([row for row, code in zip(queue, codes, strict=True) if code])
        return sent[: len(rows)]

    def alternatives(self, logits: Tensor, count: int) -> list[Alternatives]:
        """For each of the logits (N, V) the `count` likeliest ids with their log-probabilities."""
        if count == 0:
            return [[]] * len(logits)
        values, ids = top_log_probs(logits, count, self.vocabulary)
        found = []
        for of_row, logprobs in zip(ids.tolist(), values.tolist(), strict=True):
            found.append(list(zip(of_row, logprobs, strict=True)))
        return found

    def not_finite(self, row: Row, position: int) -> RuntimeError:
        dtype = dtype_name(self.model.norm.weight.dtype)
        where = f"Row {row.index}: the logits after position {position}"
        advice = "try dtype='float32', or check the weights"
        return RuntimeError(f"{where} are not finite, computed in {dtype}; {advice}.")

    def tensor(self, numbers: list) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.slots.cache.k.device)


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()
