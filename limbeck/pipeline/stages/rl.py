"""`rl`: reinforcement learning with GRPO on problems with verifiable and learned rewards."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from ...config.recipe import RL
from ...engine.rollout import Engine
from ...engine.sampling import to_sampling_params
from ...engine.vllm_client import VLLMEngine
from ...model.decoder import Decoder
from ...model.lora import LoRA
from ...run_log import ROLLOUTS, read_metrics
from ...text.tokenizer import Tokenizer
from ...train.alarms import AlarmMonitor
from ...train.grpo import GRPOTrainer
from ...train.losses import TRUNCATION
from ...train.scorer import Scorer
from ...train.training_log import TrainingLog
from ..job import Job
from .budget import budget_of
from .outcome import Outcome, outcome
from .rewards import learned_rewards
from .supervised import attach_adapters, save_model


def run(job: Job) -> Outcome:
    """Train from the last checkpoint to the end, save the model, and return the costs summed over the log."""
    stage: RL = job.stage
    decoder, tokenizer = job.model(stage.model)
    lora = attach_adapters(job, decoder)
    updates = stage.steps * stage.policy.updates_per_rollout
    sampling = replace(to_sampling_params(stage.sampling), keep_mask=stage.policy.keep_sampling_mask)
    tasks = job.mixture(stage.problems, stage.rewards)
    checkpoint = job.checkpoint()
    state = checkpoint.restore()
    run_log = job.record(state["step"] if state else 0, stage.steps)
    run_log.drop_last(ROLLOUTS, stage.log_every)
    engine = _engine(job, decoder, tokenizer)
    trainer = GRPOTrainer(
        learner=job.learner(decoder, updates, lora),
        engine=engine,
        rewards=learned_rewards(job, tasks, sampling),
        settings=stage,
        seed=job.seed,
        log=TrainingLog(run_log, stage, budget_of(job)),
        checkpoint=checkpoint,
        reference=_reference(job, lora),
        alarms=AlarmMonitor(stage, job.name, job.problems),
        tell=job.tell,
    )
    if state:
        trainer.load_state_dict(state)
        del state  # as large as the weights and their moments
    engine.reserve = trainer.learner.optimizer.missing_bytes
    trainer.train()
    checkpoint.finish(trainer.state_dict, run_log)
    tokenizer.prompt_format = tasks.prompt_format
    save_model(decoder, tokenizer, job.folder, lora)
    notes = {"engine": "vllm", "exact": False} if stage.engine else {}
    return _summarize(job, parameters=decoder.config.parameters, **notes)


def _engine(job: Job, decoder: Decoder, tokenizer: Tokenizer) -> Engine:
    """Return what samples the completions: the vLLM server that the setting `engine` names, else our own
    engine, with the decoder's weights in both cases."""
    stage: RL = job.stage
    if stage.engine is None:
        return job.engine(decoder, tokenizer, stage.sampling.speculate)
    name = f"stages.{job.name}.engine"
    job.tell(
        f"{name}: vLLM samples, so nothing is exact; the learner scores each response again, and a token's "
        f"advantage is multiplied by the ratio of both probabilities, at most {TRUNCATION:g}"
    )
    return VLLMEngine(name, stage.engine, decoder, tokenizer)


def _summarize(job: Job, **notes: Any) -> Outcome:
    """Return the costs summed over the steps of the log, and how often each alarm went off.

    `notes` are further notes for the manifest.
    """
    steps = read_metrics(job.folder)
    tokens = sum(step["sampled_tokens"] + step["learned_tokens"] for step in steps)
    alarms = Counter(alarm for step in steps for alarm in step.get("alarms", ()))
    flops = sum(step["flops"] for step in steps)
    return outcome(tokens, flops, **notes, alarms=dict(alarms))


def _reference(job: Job, lora: LoRA | None) -> Scorer | None:
    """Return the frozen model of the KL term, None without one. A reference that stays the base of adapters
    shares its weights; one that follows the policy needs weights of its own."""
    policy = job.stage.policy
    if not policy.kl_coef:
        return None
    if lora and not policy.reference_every:
        return Scorer(lora.base())
    return Scorer(job.model(job.stage.model)[0])
