"""Continuous batching: answers join and leave a running batch between periods.

One thread does all the work, in turns. A turn drops cancelled answers, admits waiting ones while
rows are free, prefills a block of prompt tokens, and then runs one period of each batch. An
answer's tokens depend only on its prompt and its request: it has its own random numbers, its draft
is as long as if it ran alone, and its prompt is always prefilled in the same blocks.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sirius_runtime.by_entries import ByEntries
from sirius_runtime.decoder import Steps, Strategy, Way, padded
from sirius_runtime.entries import PREFILL
from sirius_runtime.forking import ran_on
from sirius_runtime.generation import Choice, guard_of, next_drafts
from sirius_runtime.guard import Guard
from sirius_runtime.logits_options import TokenLogprobs
from sirius_runtime.model import SiriusModel
from sirius_runtime.policy import select_neurons
from sirius_runtime.scorer import Scorer
from sirius_runtime.serve.answers import Answer, ClosingError, DeadlineError, News
from sirius_runtime.serve.metrics import Metrics
from sirius_runtime.serve.mixed import Asking, MixedPlan
from sirius_runtime.serve.pool import Order, Pool
from sirius_runtime.serve.prefixes import PrefixCache, digests
from sirius_runtime.sizes import cache_slots
from sirius_runtime.stats import PhaseClock
from sirius_runtime.tokenizer_guard import panics_caught

_log = logging.getLogger("sirius.serve")

_STEPS = 8  # steps per turn of a batch that does not draft, while other groups have answers
_PROMPTS = "prompts"  # the group of answers whose prompt is not prefilled yet


@dataclass(frozen=True)
class Capacity:
    """The limits of an engine. rows: answers in progress; queue: waiting answers; context: tokens
    of a prompt and its answer; period: the longest period; block: prompt tokens prefilled between
    two periods; prefix_bytes: size of the prefix cache (0: no cache).
    """

    rows: int = 8
    queue: int = 64
    context: int = 4096
    period: int = 32
    block: int = 64
    prefix_bytes: int = 2**28


class OverloadedError(Exception):
    """All rows and the queue are full. seconds: estimated time until there is room."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"all rows are taken and the queue is full; try again in {seconds} s")
        self.seconds = seconds


class Engine:
    """Generates answers with a model by continuous batching. Public methods are thread-safe."""

    def __init__(self, model: SiriusModel, capacity: Capacity, metrics: Metrics) -> None:
        self.model, self.capacity, self._metrics = model, capacity, metrics
        program = model.program
        self._refresh = program.period.refresh if program.sparsity.method.per_prompt else 0
        self._slots = cache_slots(capacity.context, capacity.period, program.period.tree_width)
        with torch.inference_mode():
            self._pool = Pool(model.backend, capacity.rows, self._slots)
        self.prefixes = PrefixCache(capacity.prefix_bytes)
        self._order: Order[Answer] = Order()
        self._prompts: deque[Answer] = deque()  # with prompts to prefill, next one first
        self._scorers: dict[Hashable, tuple[list[Answer], Scorer]] = {}
        self._guards: dict[Hashable, Guard] = {}  # by batch, for batches with fallback
        self._clock = PhaseClock(torch.device("cpu"))  # required by `period`; nothing reads it
        self._changed = threading.Condition()
        self._waiting: deque[Answer] = deque()
        self._held = 0  # occupied rows
        self._stopping = False
        self._seconds = 1.0  # a running mean of an answer's time in its row
        self._thread = threading.Thread(target=self._run, name="sirius-engine", daemon=True)
        metrics.watch(self)

    @property
    def kv_bytes(self) -> int:
        """Size of all rows' K/V cache, allocated when the engine is made."""
        return self._pool.nbytes

    @property
    def running(self) -> int:
        """Number of answers that have a row."""
        return self._held

    @property
    def waiting(self) -> int:
        """Number of answers in the queue."""
        return len(self._waiting)

    @property
    def kv_usage(self) -> float:
        """Share of the K/V slots that hold a token, from 0 to 1."""
        used = sum(answer.length for answer in list(self._order.place))
        return used / (self.capacity.rows * self._slots)

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Starts its thread."""
        ran_on(self.model.backend.threads)
        self._thread.start()

    def submit(self, answers: Sequence[Answer]) -> None:
        """Queues all the answers, or none. Raises OverloadedError if there is no room for them, and
        ClosingError if the engine is stopping.
        """
        with self._changed:
            if self._stopping:
                raise ClosingError("the server is stopping")
            free = self.capacity.rows - self._held
            if len(self._waiting) + len(answers) > free + self.capacity.queue:
                ahead = len(self._waiting) + len(answers) - free - self.capacity.queue
                seconds = math.ceil(ahead * self._seconds / self.capacity.rows)
                raise OverloadedError(min(max(seconds, 1), 60))
            self._waiting.extend(answers)
            self._changed.notify()

    def cancel(self, answers: Sequence[Answer]) -> None:
        """Cancels answers: their rows are free after the current period, and they have no more
        events.
        """
        for answer in answers:
            answer.cancelled = True
        with self._changed:
            self._changed.notify()

    def halt(self) -> None:
        """Ends all answers with a ClosingError after the current period, and then the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def stop(self) -> None:
        """Halts, and waits until the thread has ended."""
        self.halt()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        with torch.inference_mode():
            while True:
                with self._changed:
                    while not (self._stopping or self._waiting or self._held):
                        self._changed.wait()
                    if self._stopping:
                        break
                try:
                    self._turn()
                except Exception as error:  # a bug must not leave all clients waiting
                    _log.exception("a turn of the engine failed")
                    self._give_up(error)
            self._give_up(ClosingError("the server is stopping"))

    def _turn(self) -> None:
        self._drop()
        self._admit()
        self._run_prompts()
        for key in self._order.groups:
            if key != _PROMPTS:
                self._go_on(key)
        self._settle()

    def _drop(self) -> None:
        """Ends answers that were cancelled or are past their deadline."""
        now = time.monotonic()
        with self._changed:
            waiting = list(self._waiting)
        for answer in [*waiting, *self._order]:
            if answer.cancelled:
                self._end(answer, None)
            elif answer.deadline <= now:
                self._end(answer, News(error=DeadlineError("the deadline has passed")))

    def _admit(self) -> None:
        while self._held < self.capacity.rows:
            with self._changed:
                if not self._waiting:
                    return
                answer = self._waiting.popleft()
                self._held += 1
            answer.admitted = time.monotonic()
            self._order.add(_PROMPTS, answer)
            self._prompts.append(answer)
            try:
                self.model.check()
            except Exception as error:
                self._end(answer, News(error=error))
                continue
            if self.capacity.prefix_bytes:
                answer.digests = digests(answer.prompt, self.capacity.block)

    # Prompts

    def _run_prompts(self) -> None:
        """Prefills about one block of tokens, of the waiting prompts in turn."""
        room = self.capacity.block
        while room > 0 and self._prompts:
            answer = self._prompts[0]
            self._settle()
            try:
                room -= self._run_block(answer)
            except Exception as error:
                self._fail([answer], error)
            if self._prompts and self._prompts[0] is answer:
                self._prompts.rotate(-1)

    def _run_block(self, answer: Answer) -> int:
        """Copies a prompt's next blocks from the prefix cache, and prefills the first block that is
        not in it. Returns the number of tokens prefilled.
        """
        size, prompt = self.capacity.block, answer.prompt
        place = self._order.place[answer]
        state = self._pool.state
        if answer.ran == 0 and state.statistic is not None:
            state.statistic[:, place] = 0
        while answer.ran + size < len(prompt) and answer.digests:  # the last token always runs
            block = self.prefixes.get(answer.digests[answer.ran // size])
            if block is None:
                break
            self._pool.restore(place, answer.ran, block)
            if block.statistic is not None:
                state.statistic[:, place : place + 1] += block.statistic
            answer.ran += size
            answer.cached += size
        begin, end = answer.ran, min(answer.ran + size, len(prompt))
        part = self._pool.part(place, [begin], [0])
        ids = torch.tensor([prompt[begin:end]], device=part.root.device)
        result = part.chain(
            PREFILL,
            ids,
            valid=torch.ones_like(ids, dtype=torch.bool),
            last=torch.full_like(ids[:, 0], end - begin - 1),
        )
        statistic: Tensor | None = result.get("statistic")
        if statistic is not None:
            state.statistic[:, place : place + 1] += statistic
        answer.ran = end
        if end - begin == size and answer.digests:
            digest = answer.digests[begin // size]
            self.prefixes.put(digest, self._pool.block(place, begin, end, statistic))
        if end == len(prompt):
            self._begin_answer(answer, place, result["logits"][:, 0])
        return end - begin

    def _begin_answer(self, answer: Answer, place: int, logits_1V: Tensor) -> None:
        """Chooses the first token from the prompt's last logits [1, V]."""
        self.prefixes.used(answer.digests)
        self._metrics.prompt(answer)
        state = self._pool.state
        if state.statistic is not None:
            self._choose_neurons([place])
        plan = MixedPlan.of([answer.asking(first=True)], 1, logits_1V.device)
        scorer = self._scorer_of([answer])
        count = torch.tensor([len(answer.prompt)], device=logits_1V.device)
        token = plan.chooser(scorer)(logits_1V, count, None)
        logprobs = [] if scorer is None or not _wants_logprobs(answer) else scorer.logprobs()[0]
        answer.first = time.monotonic()
        self._prompts.remove(answer)
        self._order.remove(_PROMPTS, answer)
        self._order.add(answer.batch, answer)
        self._commit(answer, token.tolist(), logprobs)

    def _choose_neurons(self, places: list[int]) -> None:
        state = self._pool.state
        assert state.statistic is not None
        assert state.neurons is not None
        kept = self.model.program.sparsity.kept_neurons
        state.neurons[:, places] = select_neurons(state.statistic[:, places], kept)

    # Batches

    def _go_on(self, key: Hashable) -> None:
        """Runs a batch for one turn: one period, or some steps if it does not draft."""
        alone = len(self._order.groups) == 1
        steps = 1 if alone or any(a.way is Way.DRAFT for a in self._order.of(key)) else _STEPS
        for _ in range(steps):
            answers = self._order.of(key)
            if not answers:
                return
            self._settle()
            asked = [answer.asking() for answer in answers]
            try:
                self._period(answers, asked)
            except Exception as error:
                self._one_by_one(answers, asked, error)

    def _one_by_one(
        self, answers: Sequence[Answer], asked: Sequence[Asking], error: Exception
    ) -> None:
        """After an error in a batch, runs each answer alone, so that only those that cause it fail.
        The others keep their random numbers. The failed period wrote K/V only beyond their lengths.
        """
        if len(answers) == 1:
            self._fail(answers, error)
            return
        _log.warning("a period of %d answers failed, each goes on alone: %s", len(answers), error)
        for answer, asking in zip(answers, asked, strict=True):
            self._settle()
            try:
                self._period([answer], [asking])
            except Exception as cause:
                self._fail([answer], cause)

    def _period(self, answers: list[Answer], asked: list[Asking]) -> None:
        """Runs one period of answers in neighbouring rows. On an error, no answer has changed."""
        begin, guard = self._order.place[answers[0]], self._guard_of(answers)

        def choose() -> Choice:
            if guard is None:
                return Choice(answers[0].way, self.capacity.period, 1)
            return Choice(*guard.choose(), 1)

        (way, longest, _), given = next_drafts([answer.row for answer in answers], choose)
        sizes = [
            len(copied) + 1 if copied else answer.most(longest)
            for answer, copied in zip(answers, given, strict=True)
        ]
        device = self._pool.state.root.device
        plan = MixedPlan.of(asked, max(sizes), device)
        if any(given):
            plan = replace(plan, given=torch.as_tensor(padded(given), device=device))
        refresh = self._refresh if way is Way.DRAFT else 0
        if refresh:
            plan = replace(plan, observes=True)
        part = self._pool.part(
            begin, [answer.length for answer in answers], [a.row.tokens[-1] for a in answers]
        )
        scorer = self._scorer_of(answers)
        strategy: Strategy = (
            ByEntries(scorer) if way is Way.DRAFT else Steps(way, plan.chooser(scorer))
        )
        started = time.perf_counter()
        outcome = strategy.period(part, plan, torch.tensor(sizes, device=device), self._clock)
        read = outcome.packed.tolist()  # the only transfer from the device
        if guard is not None:
            took = time.perf_counter() - started
            rows = [
                (drafted, advance - 1)
                for (*_, advance, drafted), copied in zip(read, given, strict=True)
                if not copied
            ]
            if rows:
                guard.observe(way, max(sizes), outcome.levels, rows, took)
        logprobs = scorer.logprobs() if scorer is not None and _wants_logprobs(answers[0]) else None
        if refresh:
            self._pool.keep_statistic(begin, part)
            due = []
            for index, answer in enumerate(answers):
                answer.periods += 1
                if answer.periods % refresh == 0:
                    due.append(begin + index)
            if due:
                self._choose_neurons(due)
        self._metrics.period(len(answers))
        for index, (answer, (*tokens, advance, drafted)) in enumerate(
            zip(answers, read, strict=True)
        ):
            if way is Way.DRAFT:
                answer.drafted += drafted
                answer.accepted += advance - 1
                self._metrics.draft(drafted, advance - 1)
            self._commit(answer, tokens[:advance], logprobs[index] if logprobs else [])

    def _guard_of(self, answers: list[Answer]) -> Guard | None:
        """The guard of a batch, kept while the batch has answers, with the measured costs for this
        number of rows. None if the requests fix how to draft, or sample.
        """
        first = answers[0]
        if not first.request.guarded:
            return None
        costs = self.model.costs(len(answers))
        guard = self._guards.get(first.batch)
        if guard is None:
            guard = guard_of(first.request, costs, self.model.program.acceptance)
            self._guards[first.batch] = guard
        guard.costs = costs
        return guard

    def _scorer_of(self, answers: list[Answer]) -> Scorer | None:
        """The scorer of a batch, kept while the batch has the same answers."""
        first = answers[0]
        if first.request.scoring is None:
            return None
        held, scorer = self._scorers.get(first.batch, (None, None))
        if scorer is None or held != answers:
            backend = self.model.backend
            scorer = Scorer(
                first.request,
                len(answers),
                self._slots,
                backend.program.model.vocab_size,
                backend.device,
            )
            scorer.begin([a.prompt for a in answers], [a.row.tokens for a in answers])
            self._scorers = {
                key: kept for key, kept in self._scorers.items() if key in self._order.groups
            }
            self._scorers[first.batch] = (list(answers), scorer)
        return scorer

    # Ends

    def _commit(self, answer: Answer, tokens: list[int], logprobs: Sequence[TokenLogprobs]) -> None:
        """Adds a period's committed tokens to an answer. An error ends only this answer."""
        try:
            with panics_caught():
                taken = answer.row.take(tokens)
        except Exception as error:  # no finite logits, or the tokenizer failed
            self._fail([answer], error)
            return
        self._metrics.tokens(answer, len(taken))
        news = News(taken, logprobs[: len(taken)], answer.row.reason)
        if news.last:
            self._end(answer, news)
        else:
            _tell(answer, news)

    def _fail(self, answers: Sequence[Answer], error: Exception) -> None:
        for answer in answers:
            _log.error("an answer failed", exc_info=error)
            self._end(answer, News(error=error))

    def _give_up(self, error: Exception) -> None:
        for answer in [*self._waiting, *self._order]:
            self._end(answer, News(error=error))

    def _end(self, answer: Answer, news: News | None) -> None:
        """Frees an answer's row or place in the queue, and reports how it ended."""
        with self._changed:
            if answer in self._waiting:
                self._waiting.remove(answer)
            else:
                self._held -= 1
        if answer.admitted is not None:
            if answer.first is None:
                self._prompts.remove(answer)
            self._order.remove(_PROMPTS if answer.first is None else answer.batch, answer)
            if answer.batch not in self._order.groups:
                self._guards.pop(answer.batch, None)
            if news is not None and news.reason is not None:
                took = time.monotonic() - answer.admitted
                self._seconds += 0.1 * (took - self._seconds)
        self._metrics.end(answer, news)
        if news is not None:
            _tell(answer, news)

    def _settle(self) -> None:
        """Moves rows of the K/V cache so that each batch's rows are neighbours."""
        order = self._order.settle(self.capacity.rows)
        if order is not None:
            self._pool.arrange(order, max((answer.length for answer in self._order), default=0))


def _tell(answer: Answer, news: News) -> None:
    """Reports an event. A listener that fails must not affect other answers."""
    try:
        answer.listen(news)
    except Exception:
        _log.exception("the listener of an answer failed")


def _wants_logprobs(answer: Answer) -> bool:
    """Whether its request asks for log-probabilities."""
    scoring = answer.request.scoring
    return scoring is not None and scoring.logprobs is not None
