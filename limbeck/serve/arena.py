"""How a battle is fought: who meets whom on what, both answers asked for at once, and a judge's opinion afterwards.

Nothing about an answer leaves the server before both are complete, and then both leave together: how fast a model is, or how
long it thought, shows nowhere. Sampling is the same on either side.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..config.learned_rewards import Judging
from ..eval.arena_ratings import draw_pair
from ..eval.identity import revealed
from ..tasks.files import language_of
from ..tasks.judge import Judge, Pair
from ..types import Completion, Group, LimbeckError, Problem
from .questions import Questions
from .votes import Answer, Battle, Refused, VoteStore

TEMPERATURE, TOP_P = 0.6, 0.95  # as R1 is evaluated
TRIES = 20  # while the server is full
JUDGED_AT_ONCE = 4
JUDGING = Judging(reference=False)


@dataclass
class Arena:
    """Where models of a service, and saved answers, meet. `failed` and `judging` tell what goes on in this process."""

    service: Any
    ballots: VoteStore
    questions: Questions
    failed: set[str] = field(default_factory=set)
    judging: dict[str, tuple[int, int]] = field(default_factory=dict)
    _tasks: dict[str, asyncio.Task] = field(default_factory=dict)

    def served(self) -> dict[str, Any]:
        return dict(getattr(self.service, "models", {}))

    def fighters(self) -> list[str]:
        """Everybody who can take part."""
        return [*sorted(self.served()), *self.questions.saved()]

    # ------------------------------------------------------------ a battle

    def draw(self, voter: str, wish: dict[str, Any]) -> Battle:
        """A new battle as wished: `prompt` as typed, or one from `set`; between those of `who`, or everybody."""
        saved = self.questions.saved()
        served = self.served()
        who = [name for name in (*served, *saved) if name in wish["who"] or not wish["who"]]
        problem = self._problem(
            wish, [name for name in who if name in saved], saved, sum(name in served for name in who)
        )
        able = [name for name in who if name in served or problem.prompt in saved[name]]
        if len(able) < 2:
            raise Refused("few", 409)
        pair = draw_pair(able, self.ballots.votes(), np.random.default_rng())
        sources = [source(served[name]) if name in served else "saved" for name in pair]
        return self.ballots.begin(voter, problem, pair, sources, wish)

    def _problem(
        self,
        wish: dict[str, Any],
        files: Sequence[str],
        saved: Mapping[str, Mapping[str, Answer]],
        served: int,
    ) -> Problem:
        """What is asked: as typed, or one of the set's prompts that two can answer and that was asked least."""
        if wish["prompt"].strip():
            return Problem(
                "typed", wish["prompt"].strip(), language=language_of(wish["prompt"]), origin="typed"
            )
        fit = [
            p
            for p in self.questions.open(wish["set"])
            if served + sum(p.prompt in saved[name] for name in files) >= 2
        ]
        if not fit:
            raise Refused("few", 409)
        times = self.ballots.asked()
        least = min(times.get(problem.prompt, 0) for problem in fit)
        return secrets.choice([problem for problem in fit if times.get(problem.prompt, 0) == least])

    def attend(self, battle: Battle) -> bool:
        """See to it that the answers are on their way, as often as anybody looks; on the event loop. False where they
        could not be had, which is said once: the next look tries again."""
        if battle.id in self.failed:
            self.failed.discard(battle.id)
            return False
        if not battle.answers and battle.id not in self._tasks:
            self._start(battle.id, self._fight(battle))
        return True

    async def _fight(self, battle: Battle) -> None:
        both = [asyncio.create_task(self._answer(battle, name)) for name in (battle.a, battle.b)]
        try:
            said = await asyncio.gather(*both)
        finally:
            for one in both:
                one.cancel()  # where the other has failed
        names = [*self.served(), battle.a, battle.b]
        leak = next(filter(None, (revealed(one.text, battle.prompt, names) for one in said)), "")
        await asyncio.to_thread(self.ballots.answered, battle, *said, leak)

    async def _answer(self, battle: Battle, name: str) -> Answer:
        if name not in self.served():
            kept = (await asyncio.to_thread(self.questions.saved)).get(name, {}).get(battle.prompt)
            if kept is None:
                raise LimbeckError(f"{name} is not served any more")
            return kept
        wish = {"temperature": TEMPERATURE, "top_p": TOP_P, "seed": battle.seed}
        told = await self.patiently(name, battle.prompt, **wish)
        usage = told.usage
        return Answer(
            told.answer.strip(),
            told.thought,
            usage.completion_tokens,
            usage.reasoning_tokens,
            told.finish,
            round(usage.seconds, 2),
        )

    async def patiently(self, name: str, prompt: str, **wish: Any) -> Any:
        """A whole answer; where the server is full, after waiting as long as it says."""
        for _ in range(TRIES):
            try:
                return await self.service.answer(name, [{"role": "user", "content": prompt}], **wish)
            except LimbeckError as error:
                wait = getattr(error, "retry_after", None)
                if wait is None:
                    raise
                await asyncio.sleep(wait)
        raise LimbeckError("the server is busy")

    # ------------------------------------------------------------ judges

    def call(self, judge: str) -> None:
        """Let a served model vote on what people have voted on and it has not; on the event loop, once at a time."""
        if judge in self.served() and judge not in self.judging:
            self.judging[judge] = (0, 0)
            self._start(f"judge {judge}", self._judge(judge))

    async def _judge(self, judge: str) -> None:
        voice = Judge(
            _Voice(self, judge, asyncio.get_running_loop()), JUDGING, JUDGING.sampling, secrets.token_hex(8)
        )
        try:
            battles = await asyncio.to_thread(self.ballots.unjudged, judge)
            for done in range(0, len(battles), JUDGED_AT_ONCE):
                self.judging[judge] = (done, len(battles))
                await asyncio.to_thread(self._opine, voice, judge, battles[done : done + JUDGED_AT_ONCE])
        finally:
            del self.judging[judge]

    def _opine(self, voice: Judge, judge: str, battles: Sequence[Battle]) -> None:
        pairs = [
            Pair(Problem(battle.id, battle.prompt), *(answer.text for answer in battle.answers))
            for battle in battles
        ]
        for battle, comparison in zip(battles, voice.compare(pairs), strict=True):
            self.ballots.judge(
                battle.id, judge, {"first": "a", "second": "b"}.get(comparison.verdict, comparison.verdict)
            )

    def _start(self, name: str, work: Any) -> None:
        self._tasks[name] = task = asyncio.create_task(work)
        task.add_done_callback(lambda _: self._ended(name, task))

    def _ended(self, name: str, task: asyncio.Task) -> None:
        del self._tasks[name]
        if not task.cancelled() and (error := task.exception()):
            self.failed.add(name)
            if not isinstance(error, LimbeckError):
                logging.getLogger("limbeck").error("%s", name, exc_info=error)


class _Voice:
    """A served model as the sampler that a judge asks, from a thread beside the loop. What cannot be asked says nothing."""

    def __init__(self, ring: Arena, name: str, loop: asyncio.AbstractEventLoop):
        self.ring, self.name, self.loop = ring, name, loop

    def rollout(self, problems: Sequence[Problem], group_size: int, sampling: Any, seed: Any) -> list[Group]:
        return asyncio.run_coroutine_threadsafe(self._all(problems, sampling), self.loop).result()

    async def _all(self, problems: Iterable[Problem], sampling: Any) -> list[Group]:
        return list(await asyncio.gather(*(self._one(problem, sampling) for problem in problems)))

    async def _one(self, problem: Problem, sampling: Any) -> Group:
        none = np.zeros(0, dtype=np.int64)
        try:
            told = await self.ring.patiently(self.name, problem.prompt, temperature=sampling.temperature)
            said = Completion(none, none, told.answer, told.finish == "stop", 0)
        except LimbeckError:  # longer than it can read, most likely
            said = Completion(none, none, "", False, 0)
        return Group(problem, none, (said,))


def source(served: Any) -> str:
    """Which weights a served name stands for: the artifact's name, or the directory's."""
    folder = served.folder.resolve()
    return folder.parent.name if folder.name == "model" else folder.name
