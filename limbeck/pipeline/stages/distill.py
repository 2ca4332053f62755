"""`distill`: train a student on the token distributions of teachers, on the student's own samples, on given
rows, or on both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ...config.methods import Distill
from ...engine.sampling import to_sampling_params
from ...run_log import ROLLOUTS, read, read_metrics
from ...text.prompt_format import conversation
from ...text.tokenizer import Tokenizer
from ...train.distill import LABELLED, Assigned, DistillSampler, DistillTrainer, Teacher, domain
from ...train.scorer import Scorer
from ...train.training_log import TrainingLog
from ...types import LimbeckError, Sample
from ..dataset_rows import ROWS, take_share
from ..job import Job
from .budget import budget_of, data_flops
from .label import load_labels
from .outcome import Outcome, outcome
from .ranking import require_same_vocabulary
from .rows import given_rows, to_sample
from .supervised import attach_adapters, save_model

SUMS = ("sampled_tokens", "learned_tokens", "flops", "teacher_flops")  # metrics that are summed up


def run(job: Job) -> Outcome:
    """Train from the last checkpoint to the end, save the model, and return the costs summed over the log."""
    stage: Distill = job.stage
    decoder, tokenizer = job.model(stage.model)
    lora = attach_adapters(job, decoder)
    teachers = {name: _teacher(job, name, tokenizer) for name in dict.fromkeys(stage.teachers.values())}
    rows = _rows(job, tokenizer)
    checkpoint = job.checkpoint()
    state = checkpoint.restore()
    run_log = job.record(state["step"] if state else 0, stage.steps)
    run_log.drop_last(ROLLOUTS, stage.log_every)
    tasks = job.mixture(stage.problems) if stage.problems else None
    engine = job.engine(decoder, tokenizer, stage.sampling.speculate)
    trainer = DistillTrainer(
        learner=job.learner(decoder, stage.steps, lora),
        teachers=teachers,
        sampler=DistillSampler(
            stage,
            job.seed,
            engine,
            tasks,
            to_sampling_params(stage.sampling),
            rows,
        ),
        settings=stage,
        log=TrainingLog(run_log, stage, budget_of(job, stage.rows)),
        checkpoint=checkpoint,
    )
    if state:
        trainer.load_state_dict(state)
        del state  # as large as the weights and their moments
    engine.reserve = trainer.learner.optimizer.missing_bytes
    trainer.train()
    checkpoint.finish(trainer.state_dict, run_log)
    if tasks:
        tokenizer.prompt_format = tasks.prompt_format
    save_model(decoder, tokenizer, job.folder, lora)
    steps = read_metrics(job.folder)
    total = {name: sum(step[name] for step in steps) for name in SUMS}
    return outcome(
        total["sampled_tokens"] + total["learned_tokens"],
        total["flops"],
        parameters=decoder.config.parameters,
        teacher_flops=total["teacher_flops"],
        data_flops=data_flops(job, stage.rows),
    )


def _teacher(job: Job, name: str, student: Tokenizer) -> Teacher:
    """Load the model of the input `name` as a teacher. Raises LimbeckError if its vocabulary is not the
    student's, unless the setting `divergence: text` compares spans of text."""
    decoder, tokenizer = job.model(name)
    if job.stage.divergence == "text":
        return Teacher(Scorer(decoder), (student, tokenizer))
    require_same_vocabulary(job, student, name, tokenizer)
    return Teacher(Scorer(decoder))


def _rows(job: Job, tokenizer: Tokenizer) -> list[Assigned]:
    """Return all rows as samples, each with its teacher. Raises LimbeckError if the stage names inputs with
    rows but they have none."""
    stage: Distill = job.stage
    rows = []
    for name, share in stage.rows.items():
        rows += _assigned(job, name, share, tokenizer)
    if stage.rows and not rows:
        raise LimbeckError(f"there are no rows to learn from; {', '.join(stage.rows)} kept none")
    return rows


def _assigned(job: Job, name: str, share: float, tokenizer: Tokenizer) -> Iterator[Assigned]:
    """Yield the rows of the input `name` as samples: with their stored labels if it is a `label` stage, else
    with the teacher for the domain of their problems. `share` is the part of the rows to take."""
    stage: Distill = job.stage
    if job.manifest(name)["kind"] == "label":
        for sample in _labelled(job, name, share, tokenizer):
            yield Assigned(LABELLED, sample, "")
        return
    for row in given_rows(job, name, share, tokenizer):
        teacher = stage.teachers.get(domain(row["id"]))
        if teacher is None:
            raise LimbeckError(
                f"stages.{job.name}.teachers has none for {domain(row['id'])}, of which {name} has rows"
            )
        question = conversation(row["prompt"], row.get("system", ""))
        sample = to_sample(row, tokenizer, "keep")
        if stage.completion_only_loss is False:
            sample = replace(sample, start=0)
        yield Assigned(teacher, sample, question)


def _labelled(job: Job, name: str, share: float, tokenizer: Tokenizer) -> list[Sample]:
    """Return a share of the rows of a `label` stage as samples, with the top-k log-probabilities of the
    teacher."""
    require_same_vocabulary(job, tokenizer, name, Tokenizer.from_directory(job.inputs[name] / "tokenizer"))
    temperature = job.manifest(name)["settings"]["temperature"]
    if temperature != job.stage.temperature:
        raise LimbeckError(
            f"stages.{job.name}.temperature is {job.stage.temperature:g}, but {name} was labelled at "
            f"{temperature:g}; give both the same"
        )
    samples = []
    rows = read(job.inputs[name] / ROWS)
    for row, labels in zip(rows, load_labels(job.inputs[name]), strict=True):
        if row["id"] not in job.dropped:
            samples.append(replace(to_sample(row, tokenizer, "keep"), labels=labels))
    return take_share(samples, share, (job.seed, name))
