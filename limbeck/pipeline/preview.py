"""Previews: a few prompts of a stage as the model sees them, with its answers and their verdicts, before
anything is learned.

`limbeck try` makes previews of a recipe's stages and writes nothing. `limbeck run` makes one when a stage
begins, and writes it to `runs/NAME/previews/STAGE.json`. A preview is no part of an artifact, and no random
draw of a stage depends on it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.recipe import Evaluate, Files, Load, Miniature, Problems, Stage, sources
from ..text.prompt_format import conversation
from ..types import Completion, Group, LimbeckError, Problem, Score
from .graph import Graph, Node, seed_of
from .job import Job
from .run_folder import read_json
from .store import digest_file, digest_of, write

if TYPE_CHECKING:
    from ..engine.openai_client import Endpoint
    from ..engine.rollout import Engine
    from ..engine.sampling import SamplingParams

LEARNING = ("rl", "sample", "screen", "pairs", "distill")  # kinds that sample in order to learn or to collect
FOLDER = "previews"  # in a run's folder
PROMPTS = 8  # problems, in a run
SAMPLES = 2  # answers to each problem, in a run

Preview = dict[str, Any]  # see `make`


def previewable(stage: Stage) -> bool:
    """Return True if a stage samples answers to problems, so that there is something to preview."""
    if stage.kind == "distill" and not stage.on_policy:
        return False
    return stage.kind in (*LEARNING, "evaluate") and bool(sources(stage))


def make(job: Job, model: str, prompts: int, samples: int) -> Preview:
    """Return the preview of a job's stage, as JSON: `prompts` problems with `samples` answers each, sampled
    with the stage's own settings from the model of the input `model`.

    The keys are `stage`, `kind`, `model`, `sampling`, `prompts` (each problem with its rendered prompt and
    its answers), `fixed` (True if no setting changes the prompts) and `summary` (counts). The same job gives
    the same preview, if its model is no remote endpoint. Raises LimbeckError as the stage itself would, for
    instance for a prompt that is too long.
    """
    stage = job.stage
    engine = job.sampler(model)
    sampling = _sampling(stage)
    evaluated = isinstance(stage, Evaluate)
    weights = dict.fromkeys(stage.problems, 1.0) if evaluated else stage.problems
    tasks = job.mixture(weights, getattr(stage, "rewards", None))
    seed = (job.seed, "preview")
    problems = tasks.draw(prompts, seed, "test" if evaluated else "train")
    rollout = engine.rollout(problems, samples if sampling.temperature else 1, sampling, seed)
    groups = [tasks.score(group) for group in rollout]
    return {
        "schema": 1,
        "stage": job.name,
        "kind": stage.kind,
        "model": model,
        "sampling": {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_new_tokens": sampling.max_new_tokens,
        },
        "prompts": [_prompt(engine, group) for group in groups],
        "fixed": all(isinstance(problems, Miniature) for problems in job.problems.values()),
        "summary": _summary(groups, bool(getattr(stage, "learned_rewards", None))),
    }


def _sampling(stage: Stage) -> SamplingParams:
    """Return the sampling parameters of a stage; for an evaluation those of its first way of sampling."""
    from ..engine.sampling import SamplingParams, to_sampling_params
    from .stages.evaluate import TEMPERATURE_AND_TOP_P

    if not isinstance(stage, Evaluate):
        return to_sampling_params(stage.sampling)
    temperature, top_p = TEMPERATURE_AND_TOP_P.get(stage.modes[0], (1.0, 1.0))
    return SamplingParams(temperature, top_p, stage.max_new_tokens)


def _prompt(engine: Engine | Endpoint, group: Group) -> dict[str, Any]:
    """Return a problem with its prompt as the model sees it and its answers, as JSON."""
    problem = group.problem
    return {
        "problem": problem.id,
        "language": problem.language,
        "prompt": _render(engine, problem),
        "prompt_tokens": len(group.prompt_tokens),
        "gold": problem.answer,
        "answers": [_answer(*pair) for pair in zip(group.completions, group.scores, strict=True)],
    }


def _render(engine: Engine | Endpoint, problem: Problem) -> str:
    """Return a prompt as text, with the special tokens of the chat template. A remote endpoint renders
    prompts itself; then the texts of the messages are returned."""
    asked = conversation(problem.prompt, problem.system)
    messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    if hasattr(engine, "tokenizer"):
        return engine.tokenizer.render(messages)
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _answer(completion: Completion, score: Score) -> dict[str, Any]:
    """Return a completion with the answer extracted from it and the verdict, as JSON."""
    right = score.parts["accuracy"] >= 1
    return {
        "text": completion.text,
        "tokens": len(completion.tokens),
        "stopped": completion.stopped,
        "answer": score.answer,
        "right": right,
        "reason": "" if right else score.reasons.get("accuracy", ""),
    }


def _summary(groups: Sequence[Group], learned: bool) -> dict[str, int | None]:
    """Return the counts of a preview: answers, those that ran out of tokens (`cut`), the others from which an
    answer could be `extracted`, and right ones; problems, and those whose answers differ in reward
    (`differing`).

    The last is None for one answer a problem, and if a part of the reward is `learned`, which is not
    computed here."""
    pairs = [pair for group in groups for pair in zip(group.completions, group.scores, strict=True)]
    single = all(len(group.completions) < 2 for group in groups)
    return {
        "answers": len(pairs),
        "cut": sum(not completion.stopped for completion, _ in pairs),
        "extracted": sum(completion.stopped and bool(score.answer) for completion, score in pairs),
        "right": sum(score.parts["accuracy"] >= 1 for _, score in pairs),
        "problems": len(groups),
        "differing": None if single or learned else sum(len(set(group.rewards)) > 1 for group in groups),
    }


# ---------------------------------------------------------------- in a run


def path_of(run: Path, stage: str) -> Path:
    """Return the path of a stage's preview in a run's folder."""
    return run / FOLDER / f"{stage}.json"


def read(run: Path, stage: str) -> Preview:
    """Read the preview of a stage in a run's folder; {} if there is none."""
    return read_json(path_of(run, stage))


def write_once(job: Job) -> Preview:
    """Write the preview of a job's stage to the path `job.preview`, and return it. If the path has one
    already, of the same problems, model and sampling parameters, return {}."""
    identity = _identity(job)
    if read_json(job.preview).get("identity") == identity:
        return {}
    preview = {**make(job, job.stage.model, PROMPTS, SAMPLES), "identity": identity}
    job.preview.parent.mkdir(parents=True, exist_ok=True)
    write(job.preview, json.dumps(preview, ensure_ascii=False) + "\n")
    return preview


def _identity(job: Job) -> str:
    """Return the hash of what a preview depends on, so that a resumed stage does not repeat it."""
    return digest_of(
        {
            "model": job.manifest(job.stage.model)["digest"],
            "problems": {name: _source(problems) for name, problems in job.problems.items()},
            "shares": job.stage.problems,
            "sampling": job.stage.sampling.model_dump(mode="json"),
        }
    )


def _source(problems: Problems) -> dict[str, Any]:
    """Return the settings of a problem source, with the digest of its file if it has one."""
    settings = problems.model_dump(mode="json", exclude={"download"})
    if isinstance(problems, Files):
        settings["path"] = digest_file(Path(problems.path))
    return settings


# ---------------------------------------------------------------- before a run


def nodes_to_try(graph: Graph, stage: str = "") -> list[Node]:
    """Return the stages to preview: all that sample in order to learn or to collect, except from remote
    models, or those with the name `stage`, of which an evaluation has one for each model.

    Raises LimbeckError if there is none.
    """
    possible = [node for node in graph.nodes.values() if previewable(node.stage)]
    if not stage:
        nodes = [node for node in possible if node.kind in LEARNING and _model(node) not in node.endpoints]
    else:
        nodes = [node for node in possible if stage in (node.name, node.name.split("/")[0])]
    if not nodes:
        names = ", ".join(node.name for node in possible) or "none"
        what = f"--stage {stage}: no such stage samples answers to problems" if stage else "no stage samples"
        raise LimbeckError(f"{what}; in {graph.recipe.name} these do: {names}")
    return nodes


def try_node(
    graph: Graph, node: Node, scratch: Path, prompts: int, samples: int, device: str = "cpu"
) -> Preview | None:
    """Return the preview of a stage that has not run, from the model that it would start from. If that is
    not made yet, the nearest model that it will be trained from stands in for it, and `wanted` names the
    missing one.

    Return None if there is no such model either: the base has to be pretrained first. Models that have to be
    converted are written below the temporary folder `scratch`. `device` is the resolved name of what models
    are placed on (model/ops/devices.py).
    """
    wanted = _model(node)
    if wanted in node.endpoints:
        return make(_job(graph, node, {}, device), wanted, prompts, samples)
    for name in _origins(graph, wanted):
        folder = _model_folder(graph.nodes[name], scratch)
        if folder:
            preview = make(_job(graph, node, {name: folder}, device), name, prompts, samples)
            return {**preview, "wanted": wanted} if name != wanted else preview
    return None


def _model(node: Node) -> str:
    """Return the name of the stage whose model a stage samples from."""
    return node.inputs[0] if isinstance(node.stage, Evaluate) else node.stage.model


def _origins(graph: Graph, name: str) -> Iterator[str]:
    """Yield a stage with a model, then the stage that it is trained from, and so on."""
    while name:
        yield name
        name = getattr(graph.nodes[name].stage, "model", "")


def _model_folder(node: Node, scratch: Path) -> Path | None:
    """Return a folder with the model of a stage in `model/`; None if it is not made yet. A model that the
    stage only has to load is read where it lies or, if it has to be converted, loaded into `scratch`."""
    if node.artifact:
        return node.artifact.folder
    if not isinstance(node.stage, Load):
        return None
    folder = scratch / node.name
    if not folder.exists():
        folder.mkdir(parents=True)
        source = Path(node.stage.path)
        if source.is_dir() and not node.stage.layers:
            _link(node.stage, folder / "model")
        else:
            from .stages import load

            load.run(Job(node.name, node.stage, "", {}, {}, folder))
    return folder


def _link(stage: Load, folder: Path) -> None:
    """Make `folder` the directory of a model that `stage` would load: links to its files, and its tokenizer
    with the chat template and the end-of-turn token that the stage gives it."""
    from .stages.load import read_tokenizer

    source = Path(stage.path)
    folder.mkdir()
    read_tokenizer(stage, source).save(folder)
    for file in source.iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).symlink_to(file)


def _job(graph: Graph, node: Node, models: dict[str, Path], device: str = "cpu") -> Job:
    """Return the job of a stage that has not run, with the folders of `models` among its inputs. Problems
    that a `screen` stage has yet to choose are those that it will choose from."""
    artifacts = {name: found.folder for name, found in graph.artifacts_of(node).items() if found}
    stage = node.stage
    if not isinstance(stage, Evaluate):
        stage = stage.model_copy(update={"problems": _shares(graph, stage.problems)})
    return Job(
        name=node.name,
        stage=stage,
        seed=seed_of(graph.recipe, node),
        inputs={**artifacts, **models},
        problems=node.problems,
        folder=graph.store.root / ".partial" / "preview",  # nothing is written there
        endpoints=node.endpoints,
        device=device,
    )


def _shares(graph: Graph, shares: dict[str, float]) -> dict[str, float]:
    """Return the shares of problems, with the sources of each unfinished `screen` stage in its place."""
    found: dict[str, float] = {}
    for name, share in shares.items():
        node = graph.nodes.get(name)
        inner = {name: 1.0}
        if node and not node.artifact and name not in graph.recipe.problems:
            inner = _shares(graph, node.stage.problems)
        for source, part in inner.items():
            found[source] = found.get(source, 0.0) + share * part
    return found
