"""Blind battles: choose two models and a prompt, generate both answers, and let a model vote as judge.

A battle shows the answers of two contestants to one prompt, without their names. No part of an answer leaves
the server before both are complete, so that neither speed nor the length of a thought gives a model away.
Both sides of a battle sample with the same options.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..config.learned_rewards import JudgeConfig
from ..eval.arena_ratings import draw_pair
from ..eval.identity import author_name
from ..tasks.files import language_of
from ..tasks.judge import Judge, Pair
from ..types import Completion, Group, LimbeckError, Problem
from .questions import Questions
from .service import Service
from .types import ChatOutput, ServedModel
from .votes import Answer, Battle, Refused, VoteStore

SAMPLING = {"temperature": 0.6, "top_p": 0.95}  # as R1 is evaluated
MAX_TRIES = 20  # attempts to submit a request while the server's queue is full
BATTLES_PER_JUDGE_BATCH = 4  # battles
JUDGING = JudgeConfig(reference=False)
OUTCOMES = {"first": "a", "second": "b"}  # a judge's verdicts as outcomes of a battle


@dataclass
class Arena:
    """Battles between contestants, which are served models or files with saved answers.

    `failed` holds the ids of the battles whose answers could not be generated, until the failure has been
    shown once; failed judging tasks are in it as `judge NAME`. `judging` maps each judge at work to the
    number of battles it has finished and the number of all its battles. `_tasks` holds the running tasks by
    battle id or `judge NAME`.
    """

    service: Service
    votes: VoteStore
    questions: Questions
    failed: set[str] = field(default_factory=set)
    judging: dict[str, tuple[int, int]] = field(default_factory=dict)
    _tasks: dict[str, asyncio.Task] = field(default_factory=dict)

    def served(self) -> Mapping[str, ServedModel]:
        """Return the served models by name."""
        return self.service.models

    def contestants(self) -> list[str]:
        """Return the names of all contestants: served models, then files with saved answers."""
        return [*sorted(self.served()), *self.questions.saved()]

    # ------------------------------------------------------------ battles

    def draw(self, voter: str, options: dict[str, Any]) -> Battle:
        """Draw two contestants and, unless one was typed, a prompt; store and return the new battle.

        `options` has `prompt` (the typed text, or empty), `set` (the name of a prompt set, used if no text
        was typed) and `who` (the names of the contestants to draw from; empty for all).

        Raises Refused if fewer than two contestants can answer, LimbeckError for an unknown set.
        """
        served = self.served()
        saved = self.questions.saved()
        chosen = options["who"]
        contestants = [name for name in (*served, *saved) if name in chosen or not chosen]

        def able(prompt: str) -> list[str]:
            """Return the contestants that can answer a prompt.

            A served model can answer every prompt, a file only the prompts for which it has a saved answer.
            """
            return [name for name in contestants if name in served or prompt in saved[name]]

        if options["prompt"].strip():
            problem = _typed_problem(options["prompt"])
        else:
            problems = self.questions.open(options["set"])
            problem = self._least_asked([problem for problem in problems if len(able(problem.prompt)) >= 2])
        names = able(problem.prompt)
        if len(names) < 2:
            raise Refused("few", 409)
        pair = draw_pair(names, self.votes.votes(), np.random.default_rng())
        sources = [source(served[name]) if name in served else "saved" for name in pair]
        return self.votes.begin(voter, problem, pair, sources, options)

    def _least_asked(self, problems: Sequence[Problem]) -> Problem:
        """Return a random problem among the ones that were used in the fewest battles.

        Raises Refused if `problems` is empty.
        """
        if not problems:
            raise Refused("few", 409)
        counts = self.votes.prompt_counts()
        least = min(counts.get(problem.prompt, 0) for problem in problems)
        return secrets.choice([problem for problem in problems if counts.get(problem.prompt, 0) == least])

    def ensure_answers(self, battle: Battle) -> bool:
        """Start the generation of a battle's answers unless it runs already or is done.

        Must be called on the event loop. Returns False once after the generation has failed, without a new
        attempt; the next call starts the generation again. Returns True otherwise.
        """
        if battle.id in self.failed:
            self.failed.discard(battle.id)
            return False
        if not battle.answers and battle.id not in self._tasks:
            self._start(battle.id, self._generate_answers(battle))
        return True

    async def _generate_answers(self, battle: Battle) -> None:
        """Generate both answers of a battle and store them.

        The word by which an answer names its author (a leak), if there is one, is stored too.
        """
        tasks = [asyncio.create_task(self._answer(battle, name)) for name in (battle.a, battle.b)]
        try:
            answers = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()  # if the other one has failed
        names = [*self.served(), battle.a, battle.b]
        leaks = [author_name(answer.text, battle.prompt, names) for answer in answers]
        leak = next(filter(None, leaks), "")
        await asyncio.to_thread(self.votes.add_answers, battle, *answers, leak)

    async def _answer(self, battle: Battle, name: str) -> Answer:
        """Return the answer of the contestant `name`: a served model generates it, a file has it saved."""
        if name not in self.served():
            return await self._saved_answer(battle, name)
        output = await self.answer_when_free(name, battle.prompt, **SAMPLING, seed=battle.seed)
        usage = output.usage
        return Answer(
            output.answer.strip(),
            output.thought,
            usage.completion_tokens,
            usage.reasoning_tokens,
            output.finish,
            round(usage.seconds, 2),
        )

    async def _saved_answer(self, battle: Battle, name: str) -> Answer:
        saved = await asyncio.to_thread(self.questions.saved)
        answer = saved.get(name, {}).get(battle.prompt)
        if answer is None:
            raise LimbeckError(f"{name} is not served any more")
        return answer

    async def answer_when_free(self, name: str, prompt: str, **options: Any) -> ChatOutput:
        """Return a model's complete answer to a single user message.

        While the server's queue is full, waits for the time that the server asks for and retries, `MAX_TRIES`
        times at most. Raises LimbeckError after that, and for every other error of the service.
        """
        messages = [{"role": "user", "content": prompt}]
        for _ in range(MAX_TRIES):
            try:
                return await self.service.answer(name, messages, **options)
            except LimbeckError as error:
                seconds = getattr(error, "retry_after", None)
                if seconds is None:
                    raise
                await asyncio.sleep(seconds)
        raise LimbeckError("the server is busy")

    # ------------------------------------------------------------ judges

    def start_judge(self, name: str) -> None:
        """Let the served model `name` vote on the battles that people have voted on.

        Must be called on the event loop. Does nothing if no such model is served or it is judging already.
        """
        if name in self.served() and name not in self.judging:
            self.judging[name] = (0, 0)
            self._start(f"judge {name}", self._judge_battles(name))

    async def _judge_battles(self, name: str) -> None:
        """Let the judge `name` vote, batch by batch, on all battles that it has not voted on."""
        sampler = _ServedSampler(self, name, asyncio.get_running_loop())
        judge = Judge(sampler, JUDGING, JUDGING.sampling, secrets.token_hex(8))
        try:
            battles = await asyncio.to_thread(self.votes.unjudged, name)
            for done in range(0, len(battles), BATTLES_PER_JUDGE_BATCH):
                self.judging[name] = (done, len(battles))
                batch = battles[done : done + BATTLES_PER_JUDGE_BATCH]
                await asyncio.to_thread(self._judge_batch, judge, name, batch)
        finally:
            del self.judging[name]

    def _judge_batch(self, judge: Judge, name: str, battles: Sequence[Battle]) -> None:
        """Compare the two answers of each battle and store the votes of the judge `name`.

        Equal answers are a tie without a comparison. Blocks, so it must run in a thread beside the event
        loop.
        """
        for battle in battles:
            if battle.identical:
                self.votes.judge(battle.id, name, "tie")
        battles = [battle for battle in battles if not battle.identical]
        pairs = []
        for battle in battles:
            texts = [answer.text for answer in battle.answers]
            pairs.append(Pair(Problem(battle.id, battle.prompt), *texts))
        for battle, comparison in zip(battles, judge.compare(pairs), strict=True):
            outcome = OUTCOMES.get(comparison.verdict, comparison.verdict)
            self.votes.judge(battle.id, name, outcome)

    def _start(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks[name] = task
        task.add_done_callback(lambda _: self._finish(name, task))

    def _finish(self, name: str, task: asyncio.Task) -> None:
        """Remove a finished task, and add it to `failed` if it raised.

        Errors other than LimbeckError are also logged with their traceback.
        """
        del self._tasks[name]
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        self.failed.add(name)
        if not isinstance(error, LimbeckError):
            logging.getLogger("limbeck").error("%s", name, exc_info=error)


class _ServedSampler:
    """A served model with the interface of a rollout sampler, for a judge that runs in a thread.

    `loop` is the event loop of the service, to which the thread hands its requests.
    """

    def __init__(self, arena: Arena, name: str, loop: asyncio.AbstractEventLoop):
        self.arena = arena
        self.name = name
        self.loop = loop

    def rollout(self, problems: Sequence[Problem], group_size: int, sampling: Any, seed: Any) -> list[Group]:
        """Return a group with one completion for each problem. Blocks until all are generated.

        Only the temperature of `sampling` is used; `group_size` and `seed` are ignored.
        """
        return asyncio.run_coroutine_threadsafe(self._rollout(problems, sampling), self.loop).result()

    async def _rollout(self, problems: Sequence[Problem], sampling: Any) -> list[Group]:
        return list(await asyncio.gather(*(self._complete(problem, sampling) for problem in problems)))

    async def _complete(self, problem: Problem, sampling: Any) -> Group:
        """Generate one completion for a problem, without token ids.

        The text is empty if the model fails, most likely because the prompt is too long.
        """
        text = ""
        finished = False
        try:
            temperature = sampling.temperature
            output = await self.arena.answer_when_free(self.name, problem.prompt, temperature=temperature)
            text = output.answer
            finished = output.finish == "stop"
        except LimbeckError:
            pass
        no_tokens = np.zeros(0, dtype=np.int64)
        return Group(problem, no_tokens, (Completion(no_tokens, no_tokens, text, finished, 0),))


def _typed_problem(prompt: str) -> Problem:
    """Return a `Problem` for a prompt that a person has typed."""
    return Problem("typed", prompt.strip(), language=language_of(prompt), origin="typed")


def source(served: ServedModel) -> str:
    """Return a name for the weights behind a served model: the artifact's name, or the directory's."""
    folder = served.folder.resolve()
    return folder.parent.name if folder.name == "model" else folder.name
