"""One short function per kind of stage: settings and inputs in, files in the job's folder out.

Each returns what the manifest says beyond the settings: tokens, FLOPs, notes.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...config.recipe import (
    RL,
    SFT,
    Curate,
    Evaluate,
    General,
    Load,
    Pretrain,
    Remote,
    Sample,
    Screen,
)
from ...engine.openai_client import Endpoint
from ...engine.rollout import Engine
from ...engine.sampling import SamplingParams, params_of
from ...eval.evaluate import combine, evaluate
from ...model import weights
from ...model.decoder import Decoder
from ...model.from_recipe import to_config
from ...run_log import Record, prepare, read, read_metrics
from ...text.reasoning_parser import split_thought
from ...text.tokenizer import Tokenizer
from ...train.grpo import summarize, train_grpo
from ...train.learner import Learner
from ...train.overflow import finite, spoiled
from ...train.sft import batches, plan_epochs
from ...types import Completion, Group, LimbeckError, Resumable, fingerprint
from ...types import Sample as Learned
from ..dataset_rows import PROBLEMS, ROWS, share_of
from ..job import Job
from ..review import curate as desk
from ..store import digest_of, write
from .ranking import Bill, ranked, scorer_of
from .rewards import heard, panel_of
from .training import affordable, budget_of, data_flops, fit_samples, save_model

Outcome = dict[str, Any]
CHUNK = 64  # problems between two saves of a sampling stage
BILLED = ("prompt_tokens", "response_tokens", "money", "judge_tokens", "judge_flops", "judge_money")


def run_load(job: Job) -> Outcome:
    """Copy a base model into the store, as fp32 safetensors; what it may be used for travels along."""
    stage: Load = job.stage
    source = Path(stage.path)
    if source.is_file():
        from ...model import gguf

        gguf.read(source, job.folder / "converted")
        source = job.folder / "converted"
    tokenizer = Tokenizer.from_directory(source)
    decoder = weights.load(source)
    if tokenizer.size > decoder.config.vocab_size:
        raise LimbeckError(
            f"{source}: the tokenizer knows {tokenizer.size} tokens, the model only {decoder.config.vocab_size}; "
            "they are not of one model"
        )
    if not finite(decoder.parameters()):
        name = spoiled(decoder.named_parameters())
        raise LimbeckError(f"{source}: the weight {name} is not finite; copy the model again from its source")
    if stage.layers:
        decoder = decoder.prune_layers(stage.layers)
    save_model(decoder, tokenizer, job.folder)
    shutil.rmtree(job.folder / "converted", ignore_errors=True)
    origin = source / "provenance.json"
    notes = (
        json.loads(origin.read_text(encoding="utf-8")) if origin.exists() else {"source": str(source.name)}
    )
    return {"notes": {"parameters": decoder.config.parameters, **notes}, "tokens": 0, "flops": 0}


def run_remote(job: Job) -> Outcome:
    """What is asked there, and under which terms. The endpoint is greeted, so that a wrong key is known at once."""
    stage: Remote = job.stage
    job.endpoint(job.name).check()
    told = stage.model_dump(mode="json", include={"url", "model", "licence", "logprobs", "extra"})
    write(job.folder / "endpoint.json", json.dumps(told, indent=2) + "\n")
    return {"tokens": 0, "flops": 0, "notes": {}}


def run_pretrain(job: Job) -> Outcome:
    stage: Pretrain = job.stage
    from ...tasks.clock_countdown import encode_documents

    task = job.task(stage.problems)
    tokenizer = task.tokenizer()
    decoder = Decoder(to_config(stage.shape, tokenizer.size)).initialize(fingerprint(job.seed, "weights"))
    if stage.fp8:
        from ...model.fp8 import simulate

        simulate(decoder)
    documents = encode_documents(
        watched(job.folder, task.documents(job.seed, stage.corpus), stage.tokens), tokenizer, stage.tokens
    )
    prepare(job.folder, "at work")
    plan = batches(documents, stage.batch_tokens, job.seed)
    return fit_samples(
        job, decoder, tokenizer, documents, plan, 4 * stage.batch_tokens
    )  # a batch in one piece


def watched(folder: Path, documents: Iterator[list[str]], tokens: int) -> Iterator[list[str]]:
    """The documents of a corpus as they are; now and then it is told which share of its `tokens` is written."""
    written, told = 0, time.monotonic()
    for words in documents:
        yield words
        written += len(words)
        if time.monotonic() - told > 1:
            prepare(folder, f"writes its corpus, {written / tokens:.0%}")
            told = time.monotonic()


def run_sft(job: Job) -> Outcome:
    stage: SFT = job.stage
    decoder, tokenizer = job.model(stage.model)
    samples = [
        to_sample(row, tokenizer, stage.thoughts, (stage.system or {}).get(name, ""))
        for name, share in stage.rows.items()
        for row in given_rows(job, name, share, tokenizer)
    ]
    if not samples:
        raise LimbeckError(f"there are no rows to learn from; {', '.join(stage.rows)} kept none")
    plan = plan_epochs(samples, stage.epochs, stage.batch_tokens, job.seed)
    plan = affordable(plan, samples, decoder.config, budget_of(job, stage.rows))
    outcome = fit_samples(job, decoder, tokenizer, samples, plan, stage.batch_tokens)
    return {
        **outcome,
        "notes": {**outcome["notes"], "rows": len(samples), "data_flops": data_flops(job, stage.rows)},
    }


def run_rl(job: Job) -> Outcome:
    stage: RL = job.stage
    decoder, tokenizer = job.model(stage.model)
    updates = stage.steps * stage.policy.updates_per_rollout
    learner = Learner(decoder, stage.optimizer, updates, stage.recompute)
    reference = Learner(job.model(stage.model)[0], stage.optimizer, 1) if stage.policy.kl_coef else None
    engine, checkpoint = Engine(decoder, tokenizer, speculate=stage.sampling.speculate), job.checkpoint()
    tasks = job.mixture(stage.problems, stage.rewards)
    sampling = replace(params_of(stage.sampling), keep_mask=stage.policy.keep_sampling_mask)
    state = checkpoint.restore()
    record = job.record(state["step"] if state else 0, stage.steps)
    panel = panel_of(job, tasks, sampling)
    train_grpo(
        learner,
        reference,
        engine,
        tasks,
        sampling,
        stage,
        job.seed,
        record,
        checkpoint,
        budget_of(job),
        panel,
    )
    save_model(decoder, tokenizer, job.folder)
    history = read_metrics(job.folder)
    tokens, flops = (
        sum(row["sampled_tokens"] + row["learned_tokens"] for row in history),
        sum(row["flops"] for row in history),
    )
    alarms = dict(Counter(text for row in history for text in row.get("alarms", ())))
    return {
        "tokens": tokens,
        "flops": flops,
        "notes": {"parameters": decoder.config.parameters, "alarms": alarms},
    }


def run_sample(job: Job) -> Outcome:
    stage: Sample = job.stage
    written = {"sampler": job.manifest(stage.model)["digest"]}
    if remote := job.endpoints.get(stage.model):
        written |= {"endpoint": remote.url, "model": remote.model}
    scorer, bill = scorer_of(job) if stage.keep == "best" else (None, dict)

    def judge(group: Group) -> tuple[list[dict], Counter[str]]:
        faults = [_fault(group, i, stage) for i in range(len(group.completions))]
        places = [i for i in ranked(group, stage.keep, scorer) if not faults[i]]
        good = [group.completions[i] for i in places]
        kept = _distinct(good, stage.keep_per_problem)
        verdicts = Counter(fault for fault in faults if fault)
        verdicts["one of many for its problem"] += len(good) - len(kept)
        return [to_row(group, completion, written) for completion in kept], verdicts

    outcome = sweep(job, ROWS, stage.prompts, judge, bill)
    if remote:
        return outcome
    tokenizer = job.model(stage.model)[1]
    return {**outcome, "notes": {**outcome["notes"], "tokenizer": digest_of(tokenizer.backend.to_str())}}


def run_screen(job: Job) -> Outcome:
    stage: Screen = job.stage

    def judge(group: Group) -> tuple[list[dict], Counter[str]]:
        rate = sum(s.parts["accuracy"] for s in group.scores) / len(group.scores)
        if stage.low < rate < stage.high:
            return [{**asdict(group.problem), "pass_rate": rate}], Counter()
        return [], Counter(["never solved" if rate <= stage.low else "always solved"])

    outcome = sweep(job, PROBLEMS, stage.limit, judge)
    if not outcome["notes"]["kept"]:
        dropped = outcome["notes"]["dropped"]
        raise LimbeckError(
            f"of {stage.limit} problems {dropped.get('never solved', 0)} are never and "
            f"{dropped.get('always solved', 0)} always solved, none sometimes; take other ones than {', '.join(stage.problems)}"
        )
    return outcome


def run_curate(job: Job) -> Outcome:
    stage: Curate = job.stage
    rows = job.rows(stage.rows)
    if stage.auto:
        known = {row["id"].partition("/")[0] for row in rows} & set(job.problems)
        kept, notes = desk.by_policy(rows, stage.policy, {name: job.task(name) for name in known})
    else:
        kept, notes = desk.by_people(rows, job.queue, job.said)
    desk.write_rows(job.folder / ROWS, kept)
    carried = {k: v for k, v in job.manifest(stage.rows)["notes"].items() if k == "tokenizer"}
    return {
        "tokens": 0,
        "flops": 0,
        "notes": {**notes, **carried, "data_flops": data_flops(job, [stage.rows])},
    }


def run_general(job: Job) -> Outcome:
    """Rows whose answer is given with the problem and needs no thought."""
    stage: General = job.stage
    tasks = job.mixture({stage.problems: 1.0})
    rows = [
        {
            "id": p.id,
            "prompt": p.prompt,
            "language": p.language,
            "completion": f"<answer> {p.answer} </answer>",
            "origin": {"problem": p.origin, "writer": "the world itself"},
        }
        for p in tasks.draw(stage.rows, (job.seed, "prompts"))
    ]
    desk.write_rows(job.folder / ROWS, rows)
    return {"tokens": 0, "flops": 0, "notes": {"rows": len(rows)}}


def run_evaluate(job: Job) -> Outcome:
    stage: Evaluate = job.stage
    model = next(iter(job.inputs))
    decoder, tokenizer = job.model(model)
    engine = job.sampler(model)
    sources = {name: job.mixture({name: 1.0}) for name in stage.problems}
    ways = {way: _way(way, stage, job.control, tokenizer) for way in stage.modes}
    kept, total = job.folder / "ways.jsonl", len(ways) * len(sources)
    parts = list(read(kept))
    desk.write_rows(kept, parts)  # without what a kill left half-written
    record = job.record(len(parts), total)
    for part in evaluate(engine, sources, stage, ways, job.seed, len(parts)):
        accuracy = part["modes"][part["way"]]["accuracy"]["mean"]
        record.step(len(parts), {"source": part["source"], "mode": part["way"], "accuracy": accuracy})
        parts.append(part)
        desk.write_rows(kept, parts)
        pause(job, record, len(parts) < total)
    kept.unlink()
    result = {"schema": 1, "model": model, "control": job.control, **combine(parts, job.seed)}
    tokens = sum(part["tokens"] for part in parts)
    desk.write_rows(job.folder / "samples.jsonl", [row for part in parts for row in part["samples"]])
    write(job.folder / "evaluation.json", json.dumps(result, indent=2) + "\n")
    length = result["sources"][next(iter(sources))]["modes"][stage.modes[0]].get("length", 100)
    flops = tokens * decoder.config.flops_per_token(length / 2)
    return {"tokens": tokens, "flops": flops, "notes": {"parameters": decoder.config.parameters}}


def _way(way: str, stage: Evaluate, control: str | None, tokenizer: Tokenizer) -> SamplingParams:
    """Temperature 1; 0.6 with top-p 0.95 (the paper's); greedy. The forced control never lets it give up."""
    temperature, top_p = {"greedy": (0.0, 1.0), "t06": (0.6, 0.95)}.get(way, (1.0, 1.0))
    force = {}
    if control == "forced":
        pairs = stage.retry.items()
        force = {tokenizer.encode(after)[0]: tokenizer.encode(then)[0] for after, then in pairs}
    return SamplingParams(temperature, top_p, stage.max_new_tokens, force=force)


STAGES: dict[str, Callable[[Job], Outcome]] = {
    "load": run_load, "remote": run_remote, "pretrain": run_pretrain, "rl": run_rl, "screen": run_screen, "sample": run_sample,
    "curate": run_curate, "sft": run_sft, "general": run_general, "evaluate": run_evaluate,
}  # fmt: skip


# ---------------------------------------------------------------- models and rows


def to_row(group: Group, completion: Completion, written: dict[str, str]) -> dict[str, Any]:
    """A kept completion with where it came from. Its ids travel along: they are what was sampled. A remote model's
    are not known, and its row is text alone."""
    thought = split_thought(completion.text)
    known = {"tokens": completion.tokens.tolist()} if (completion.tokens >= 0).all() else {}
    return {
        "id": f"{group.problem.id}#{completion.sample}",
        "prompt": group.problem.prompt,
        "language": group.problem.language,
        "completion": completion.text,
        "reasoning_content": thought.thought,
        "content": thought.answer,
        **known,
        "origin": {"problem": group.problem.origin, **written},
    }


def given_rows(job: Job, name: str, share: float, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The share of a stage's rows. Ids mean something to the tokenizer that made them alone: another gets the text."""
    rows = share_of(job.rows(name), share, (job.seed, name))
    made_by = job.manifest(name)["notes"].get("tokenizer")
    if made_by in (None, digest_of(tokenizer.backend.to_str())):
        return rows
    return [{k: v for k, v in row.items() if not k.endswith("tokens")} for row in rows]


def to_sample(row: dict[str, Any], tokenizer: Tokenizer, thoughts: str, system: str = "") -> Learned:
    """A row as tokens: those that were sampled where nobody edited, else the written text's."""
    asked = (
        [{"role": "system", "content": system}, {"role": "user", "content": row["prompt"]}]
        if system
        else row["prompt"]
    )
    prompt = tokenizer.prompt(asked)
    if thoughts == "drop":
        response = tokenizer.response(row.get("content") or row["completion"])
    elif "tokens" in row:
        response = np.array(row["tokens"], dtype=np.int64)
    else:
        response = tokenizer.response(row["completion"])
    return Learned(np.concatenate([prompt, response]), start=len(prompt))


# ---------------------------------------------------------------- sampling


def sweep(
    job: Job,
    name: str,
    count: int,
    judge: Callable[[Group], tuple[list[dict], Counter[str]]],
    bill: Bill = dict,
) -> Outcome:
    """Draw, answer and judge problems chunk by chunk into a file of rows. Each chunk's record says how long the
    file was after it, so a stage that was killed goes on after its last whole chunk. `bill` is what judging cost."""
    stage = job.stage
    engine, tasks = job.sampler(stage.model, stage.sampling.speculate), heard(job)
    asked = tasks.draw(count, (job.seed, "prompts"))
    chunks = [asked[i : i + CHUNK] for i in range(0, count, CHUNK)]
    done = read_metrics(job.folder)
    record = job.record(len(done), len(chunks))
    with open(job.folder / name, "ab") as file:
        file.truncate(done[-1]["bytes"] if done else 0)
        for step in range(len(done), len(chunks)):
            groups = [
                tasks.score(g)
                for g in engine.rollout(chunks[step], stage.samples, params_of(stage.sampling), job.seed)
            ]
            judged = [judge(group) for group in groups]
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for rows, _ in judged for row in rows]
            file.write("".join(lines).encode())
            file.flush()
            dropped = sum((verdicts for _, verdicts in judged), Counter())
            tokens = sum(len(c.tokens) for g in groups for c in g.completions)
            counts = {
                "sampled_tokens": tokens,
                "kept": len(lines),
                "dropped": dict(sorted(dropped.items())),
                "bytes": file.tell(),
            }
            beside = Counter(getattr(tasks, "bill", dict)())
            beside.update(bill())  # two judges may have been asked
            record.step(step, {**summarize(groups), **counts, **engine.bill(), **beside}, groups[:1])
            pause(job, record, step < len(chunks) - 1)
    return _swept(job, engine, count * stage.samples)


def pause(job: Job, record: Record, more: bool) -> None:
    """Stop between two steps where that was asked for and work is left."""
    if more and job.stopping():
        record.sync()
        raise Resumable(f"{job.name} stopped; the same command goes on from here")


def _swept(job: Job, engine: Engine | Endpoint, sampled: int) -> Outcome:
    """What all chunks came to. How many FLOPs an endpoint spends nobody knows; its tokens and its price are told."""
    history = read_metrics(job.folder)
    tokens = sum(row["sampled_tokens"] for row in history)
    length = sum(row["length"] for row in history) / len(history)
    dropped = sum((Counter(row["dropped"]) for row in history), Counter())
    notes = {"sampled": sampled, "kept": sum(row["kept"] for row in history), "dropped": dict(dropped)}
    bill = {
        name: sum(row[name] for row in history) for name in (*BILLED, "teacher_flops") if name in history[0]
    }
    beside = bill.get("judge_flops", 0) + bill.get("teacher_flops", 0)
    if isinstance(engine, Engine):
        flops = tokens * engine.model.config.flops_per_token(length / 2) + beside
        return {"tokens": tokens, "flops": flops, "notes": {**notes, **bill}}
    if engine.settings.prices:
        bill["currency"] = engine.settings.prices.currency
    told = {"endpoint": engine.settings.url, "model": engine.settings.model, **bill}
    return {"tokens": tokens, "flops": beside, "notes": {**notes, **told}}


def _fault(group: Group, i: int, stage: Sample) -> str | None:
    """Why a completion is not kept, or None."""
    completion, parts = group.completions[i], group.scores[i].parts
    if not completion.stopped:
        return "ran out of tokens"
    if stage.correct and parts["accuracy"] < 1:
        return "wrong"
    if stage.wellformed and parts.get("format", 1.0) < 1:
        return "not well-formed"
    if parts.get("language", 1.0) < stage.language:
        return "mixed languages"
    if stage.longest and len(completion.tokens) > stage.longest:
        return "too long"
    if parts.get("judge", 1.0) < (0.5 if stage.judged is None else stage.judged):
        return "the judge thinks little of it"
    return None


def _distinct(completions: list[Completion], most: int) -> list[Completion]:
    """The first `most` that differ in text."""
    return list({completion.text: completion for completion in reversed(completions)}.values())[::-1][:most]
