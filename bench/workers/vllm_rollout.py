"""The same rollouts by vLLM on the processor: `n` samples a prompt, prefix cache on, in this process."""

from __future__ import annotations

import os

from turns import SETTINGS, Clock, tell, turns

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="2",
    VLLM_NO_USAGE_STATS="1",
    DO_NOT_TRACK="1",
    VLLM_PLUGINS="",
    VLLM_CPU_OMP_THREADS_BIND=f"0-{SETTINGS['threads'] - 1}",
)

import torch
from tokenizers import Tokenizer
from vllm import LLM, SamplingParams

tokenizer = Tokenizer.from_file(f"{SETTINGS['model']}/tokenizer.json")
rows = len(SETTINGS["texts"]) * SETTINGS["group"]
model = LLM(
    SETTINGS["model"],
    dtype="float32",
    skip_tokenizer_init=True,
    enforce_eager=SETTINGS["eager"],
    max_model_len=512,
    max_num_seqs=rows,
    max_num_batched_tokens=4096,
    disable_log_stats=True,
    seed=0,
)
asked = [
    {"prompt_token_ids": tokenizer.encode(text, add_special_tokens=False).ids} for text in SETTINGS["texts"]
]


def rollout(length: int) -> float:
    """Seconds of a rollout with responses of `length` tokens."""
    clock = Clock()
    model.reset_prefix_cache()  # what the last turn read is not there for this one
    sampling = SamplingParams(
        n=SETTINGS["group"], temperature=1.0, max_tokens=length, ignore_eos=True, detokenize=False
    )
    model.generate(asked, sampling, use_tqdm=False)
    return clock.elapsed()


for _ in turns():
    tell(torch, rollout, rows)
