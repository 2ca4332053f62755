"""Whether a stage fits a card: its memory at the peak, rows sampled at once, settings that make it fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from ..config.parts import Budgeted, LoRA, ModelStage
from ..config.recipe import RL, Distill, Label, Recipe, Remote
from ..model.config import ModelConfig
from . import cost
from .activations import Activations, position_bytes
from .chips import Chip
from .micro_batch import MicroBatch, micro_batch
from .rollout_memory import RolloutMemory
from .roofline import Roofline
from .stage_memory import CONTEXT, GIB, Learning, Memory
from .stage_work import SMALL, StageWork

LEARNING_ROWS = 256  # rows that an engine decodes at once in `rl` and `distill`, and of a small model
READING_ROWS = 64  # rows of a larger model elsewhere (pipeline/job.py)
SMALLEST_BATCH = 64  # least `batch_tokens`
WIDTHS = {"float32": 4, "bfloat16": 2}  # bytes of a number

Changes = dict[str, Any]  # settings by their dotted names within a stage


@dataclass(frozen=True)
class Fit:
    """Whether a stage fits a card of `capacity` bytes.

    `rows` of the `wanted` rows are sampled at once; both are 0 for a stage that samples nothing. Of a stage
    that does not fit, `remedies` are the settings with which it does, and `relieved` is how it fits then;
    without such settings, {} and None.
    """

    memory: Memory
    capacity: float
    rows: int = 0
    wanted: int = 0
    remedies: Changes | None = None
    relieved: Fit | None = None

    @property
    def fits(self) -> bool:
        """True if the card runs the stage as it is."""
        return self.memory.total <= self.capacity and self.rows >= min(1, self.wanted)

    def work(self, work: StageWork) -> StageWork:
        """Return the stage's work with the remedies that change its time."""
        names = {"recompute": "recompute", "precision": "precision", "optimizer.offload": "offload"}
        changes = {names[key]: value for key, value in (self.remedies or {}).items() if key in names}
        return replace(work, **changes)

    @property
    def rows_at_once(self) -> int:
        """The rows that are sampled at once, with the remedies if the stage needs them."""
        return self.relieved.rows if self.relieved else self.rows

    def told(self) -> dict[str, Any]:
        """Return the figures as a JSON object, memory in GiB."""
        parts = {name: round(size / GIB, 3) for name, size in self.memory.parts().items() if size}
        told: dict[str, Any] = {
            "fits": self.fits,
            "gib": round(self.memory.total / GIB, 3),
            "of_gib": round(self.capacity / GIB, 3),
            "parts": parts,
        }
        if self.wanted:
            told |= {"rows_at_once": self.rows, "rows": self.wanted}
        if not self.fits:
            told["fits_with"] = {name: _plain(value) for name, value in (self.remedies or {}).items()}
            told["fits_with_gib"] = round(self.relieved.memory.total / GIB, 3) if self.relieved else None
        return told


def _plain(value: Any) -> Any:
    """Return the value of a setting as JSON has it."""
    return value.model_dump() if isinstance(value, LoRA) else value


def foresee(
    stage: object, work: StageWork, configs: Mapping[str, ModelConfig], recipe: Recipe, chip: Chip
) -> Fit | None:
    """Return whether a stage fits a card; None for a stage that computes nothing on it.

    `configs` maps the name of each stage's model to its shape.
    """
    model = getattr(stage, "model", "")
    if not isinstance(stage, ModelStage) or isinstance(recipe.stages.get(model), Remote):
        return None
    config = configs.get(work.model)
    if config is None:
        return None
    precision = stage.precision or recipe.precision or "float32"
    stage = stage.model_copy(update={"precision": precision})
    readers = _readers(stage, configs, recipe)
    placed = _StageOnCard(stage, work, config, readers, chip)
    fit = placed.fit()
    return fit if fit.fits else placed.relieve(fit)


def _readers(stage: ModelStage, configs: Mapping[str, ModelConfig], recipe: Recipe) -> list[ModelConfig]:
    """Return the shapes of the models that a stage holds beside its own: a reference, teachers, judges."""
    names = []
    if isinstance(stage, RL):
        shared = stage.lora and not stage.policy.reference_every
        names += [stage.model] * bool(stage.policy.kl_coef and not shared)
        for opinion in (stage.learned_rewards or {}).values():
            names.append(getattr(recipe.stages[opinion.of], "judge", opinion.of))
    if isinstance(stage, Distill):
        names += dict.fromkeys(stage.teachers.values())
    if scorer := getattr(stage, "scored_by", None):
        names.append(getattr(recipe.stages[scorer], "judge", scorer))
    return [configs[name] for name in names if name in configs]


@dataclass(frozen=True)
class _StageOnCard:
    """A stage on a card, with the shape of its model and of those that it holds beside it."""

    stage: ModelStage
    work: StageWork
    config: ModelConfig
    readers: list[ModelConfig]
    chip: Chip

    @property
    def width(self) -> int:
        """Bytes of a weight."""
        return WIDTHS[self.stage.precision]

    def fit(self) -> Fit:
        """Return whether the stage fits, without remedies."""
        learns = hasattr(self.stage, "optimizer")
        held = self._held(learns)
        free = self.chip.memory - replace(held, moments=0.0).total
        rollout = self._rollout(free, self._learning().reserved if learns else 0.0)
        peaks = [held]
        if learns:
            peak = self._learning().peak()
            peaks = [replace(peak, reference=held.reference, context=held.context)]
        elif isinstance(self.stage, Label):
            peaks = [replace(held, activations=self._reading())]
        if rollout:
            peaks = [replace(peak, cache=rollout.pool, sampling=rollout.steps) for peak in (*peaks, held)]
            peaks[-1] = replace(peaks[-1], sampling=rollout.steps + rollout.prefill)
        peak = max(peaks, key=lambda memory: memory.total)
        rows = rollout.rows if rollout else 0
        return Fit(peak, self.chip.memory, rows, rollout.wanted if rollout else 0)

    def _held(self, learns: bool) -> Memory:
        """Return what is there all the time: the stage's models, and the state of its optimizer."""
        held = self._learning().held if learns else self._frozen()
        reference = self.width * sum(cost.weights(config) for config in self.readers)
        if learns and isinstance(self.stage, Distill) and self.readers:
            widest = max(config.hidden_size for config in self.readers)
            reference += self.width * widest * self.work.learned / max(1.0, self.work.updates)
        return replace(held, reference=reference, context=CONTEXT)

    def _frozen(self) -> Memory:
        """Return the memory of a model that does not learn."""
        table = self.config.max_positions * position_bytes(self.config)
        return Memory(weights=self.width * cost.weights(self.config) + table)

    def _learning(self) -> Learning:
        """Return the learner of the stage."""
        stage = self.stage
        batch = micro_batch(stage, self.work)
        recompute = getattr(stage, "recompute", False)
        lora = getattr(stage, "lora", None)
        units = Roofline(self.chip, "bf16").units
        return Learning(self.config, self.width, batch, stage.optimizer, recompute, lora, units)

    def _reading(self) -> float:
        """Return the bytes of a forward pass over the tokens of a micro-batch, and of the head's logits."""
        tokens = self.stage.batch_tokens
        batch = MicroBatch(tokens, tokens, tokens, 1, tokens)
        passes = Activations(self.config, self.width, batch, 1, frozen=True)
        return max(passes.forward(layer) for layer in range(self.config.layers)) + passes.logits

    def _rollout(self, free: float, reserved: float) -> RolloutMemory | None:
        """Return the rollout that needs the most memory; None for a stage that samples nothing here."""
        if not self.work.rollouts or getattr(self.stage, "engine", None):
            return None  # vLLM samples on a card of its own
        largest = max(self.work.rollouts, key=lambda rollout: rollout.rows)
        group = max(1, round(largest.rows / max(1.0, largest.prompts)))
        at_once = READING_ROWS
        if isinstance(self.stage, RL | Distill) or self.config.parameters < SMALL:
            at_once = LEARNING_ROWS
        wanted = max(group, min(at_once, round(largest.rows)))
        sampling = getattr(self.stage, "sampling", None)
        limit = sampling.max_new_tokens if sampling else getattr(self.stage, "max_new_tokens", 0)
        prompt = max(1, round(largest.prompt))
        limit = limit or round(largest.longest)
        return RolloutMemory(self.config, self.width, wanted, group, prompt, limit, free, reserved)

    # ------------------------------------------------------------ remedies

    def relieve(self, fit: Fit) -> Fit:
        """Return the fit with the first combination of settings with which the stage fits, if there is one.

        Every combination of gentler settings comes before any with a harsher one.
        """
        options = self._options()
        for chosen in product(*reversed(options)):
            changes: Changes = {}
            for change in reversed(chosen):
                changes |= change
            if not changes or self._contradicts(changes):
                continue
            changed = self._changed(changes).fit()
            if changed.fits:
                return replace(fit, remedies=changes, relieved=changed)
        return replace(fit, remedies={})

    def _options(self) -> list[list[Changes]]:
        """Return what can be changed, the gentlest first, each with its values; the first leaves it.

        Computing again changes no number, 16 bits round, the optimizer's settings approximate or are slower,
        a smaller batch changes the update where it is an update, adapters change what is learned.
        """
        stage = self.stage
        options: list[list[Changes]] = []
        if "recompute" in type(stage).model_fields:
            forms = {False: ["keep_attention", True], "keep_attention": [True]}.get(stage.recompute, [])
            options.append([{}, *({"recompute": form} for form in forms)])
        if self.width == 4:
            options.append([{}, {"precision": "bfloat16"}])
        if hasattr(stage, "optimizer"):
            adamw = {"optimizer.name": "adamw"} if stage.optimizer.name == "muon" else {}
            for key, value in (("moments", "int8"), ("masters", False), ("offload", True)):
                if getattr(stage.optimizer, key) != value:
                    options.append([{}, {**adamw, f"optimizer.{key}": value}])
        options.append([{}, *({"batch_tokens": tokens} for tokens in self._smaller_batches())])
        if isinstance(stage, Budgeted) and not stage.lora:
            options.append([{}, {"lora": LoRA()}])
        return options

    def _smaller_batches(self) -> Iterator[int]:
        """Yield smaller values of `batch_tokens`, by halves, as long as they make the micro-batch smaller."""
        tokens = getattr(self.stage, "batch_tokens", 0)
        if not hasattr(self.stage, "optimizer"):
            return
        size = micro_batch(self.stage, self.work).tokens
        while tokens // 2 >= SMALLEST_BATCH:
            tokens //= 2
            smaller = micro_batch(self.stage.model_copy(update={"batch_tokens": tokens}), self.work).tokens
            if smaller >= size:
                return
            size = smaller
            yield tokens

    def _contradicts(self, changes: Changes) -> bool:
        """Return True if a recipe may not have these settings together."""
        optimizer = changes.get("optimizer.masters") is False
        half = self.width == 2 or "precision" in changes
        return optimizer and (not half or "lora" in changes or bool(getattr(self.stage, "lora", None)))

    def _changed(self, changes: Changes) -> _StageOnCard:
        """Return the same with other settings; a reference that is the base of adapters needs no weights."""
        of_optimizer = {k.partition(".")[2]: v for k, v in changes.items() if k.startswith("optimizer.")}
        update = {k: v for k, v in changes.items() if not k.startswith("optimizer.")}
        if of_optimizer:
            update["optimizer"] = self.stage.optimizer.model_copy(update=of_optimizer)
        stage = self.stage.model_copy(update=update)
        readers = self.readers
        if "lora" in changes and isinstance(stage, RL) and stage.policy.kl_coef:
            readers = readers if stage.policy.reference_every else readers[1:]
        return replace(self, stage=stage, readers=readers)
