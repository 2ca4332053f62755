"""The loop over generations: carry a generation's recipe out, let the gate decide, write the ledger.

Everything is on disk: runs and artifacts as of any run, decisions in the ledger. So the loop can be killed
anywhere, and called again it goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ...config.recipe import Recipe
from ...types import Resumable
from ..run_folder import INDEX, read_json
from ..store import Artifact, Store
from .evidence import Measured, decide, measure
from .ledger import Entry, Ledger, open_ledger, training_costs
from .recipes import Plan, find_plan, recipe_of, run_name, suffixed

CarryOut = Callable[[Recipe], None]  # carry the recipe of a generation out, to its end
Votes = Callable[[str, str], Sequence[int]]  # people's votes on (champion, candidate), by their artifacts


class Iteration:
    """The generations of a recipe in a folder of runs."""

    def __init__(
        self, recipe: Recipe, runs: Path, carry_out: CarryOut, votes: Votes, say: Callable[[str], None]
    ):
        """Find out what is repeated, and read the ledger. `say` shows the user a message.

        Raises LimbeckError if the recipe leaves open what is repeated, or the ledger is of another recipe."""
        self.recipe = recipe
        self.runs = runs
        self.store = Store(runs / "store")
        self.carry_out = carry_out
        self.votes = votes
        self.say = say
        self.plan: Plan = find_plan(recipe)
        self.ledger: Ledger = open_ledger(recipe, runs)

    def advance(self, generations: int) -> Ledger:
        """Carry out and decide generations until there are as many, and return the ledger.

        Raises Resumable if a run was stopped, or if a decision waits for votes."""
        for generation in range(len(self.ledger.entries) + 1, generations + 1):
            recipe, champion = recipe_of(self.recipe, self.plan, self.ledger.promoted)
            self.say(f"generation {generation} of {generations}: {recipe.name}")
            self.carry_out(recipe)
            self.ledger = self.ledger.with_entry(self.judge(generation, champion))
        return self.ledger

    def judge(self, generation: int, champion: str) -> Entry:
        """Return the decision on the model of a generation whose run is finished, against the stage
        `champion`."""
        candidate = suffixed(self.plan.model, generation)
        before = self._measured(generation, champion)
        after = self._measured(generation, candidate)
        votes = self._votes(generation, before, after)
        folders = [self._evaluation(generation, stage).folder for stage in (champion, candidate)]
        decision = decide(self.plan, *folders, votes)
        promoted = generation == 1 or decision.promoted
        run = run_name(self.recipe.name, generation)
        return Entry(generation, run, after, before, decision, promoted, self._training(generation))

    def _votes(self, generation: int, champion: Measured, candidate: Measured) -> Sequence[int]:
        """Return people's votes on two models. Raises Resumable if there are too few to decide, and the
        recipe says to wait for them."""
        votes = self.votes(champion.artifact, candidate.artifact)
        gate = self.plan.settings.gate
        if generation > 1 and gate.wait_for_votes and len(votes) < gate.votes:
            models = f"{champion.artifact} {candidate.artifact} --runs {self.runs}"
            raise Resumable(
                f"generation {generation} waits for people's votes, of which there are {len(votes)} of "
                f"{gate.votes}: serve both models with `limbeck serve {models}`, vote in the studio's arena, "
                "then give the same command again"
            )
        return votes

    # ------------------------------------------------------------ artifacts

    def _artifact(self, generation: int, stage: str) -> Artifact:
        """Return the finished artifact of a stage of a generation."""
        index = read_json(self.runs / run_name(self.recipe.name, generation) / INDEX)
        return self.store.open(self.store.root / index[stage])

    def _evaluation(self, generation: int, model: str) -> Artifact:
        """Return the evaluation of a model in a generation's run."""
        return self._artifact(generation, f"{suffixed(self.plan.evaluation, generation)}/{model}")

    def _measured(self, generation: int, model: str) -> Measured:
        """Return what a generation's evaluation found of a model."""
        artifact = self._artifact(generation, model)
        return measure(model, artifact, self._evaluation(generation, model), self.plan)

    def _training(self, generation: int) -> dict[str, float]:
        """Return the costs of the stages that a generation added to those before it, evaluations aside."""
        index = read_json(self.runs / run_name(self.recipe.name, generation) / INDEX)
        earlier: set[str] = set()
        for entry in self.ledger.entries:
            earlier |= set(read_json(self.runs / entry.run / INDEX).values())
        names = {name for stage, name in index.items() if "/" not in stage} - earlier
        return training_costs([self.store.open(self.store.root / name).manifest for name in sorted(names)])
