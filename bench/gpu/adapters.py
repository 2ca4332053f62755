"""LoRA on a card: the sampler beside a learner of adapters, and an update of a 4B shape."""

from __future__ import annotations

import numpy as np
import torch

from limbeck.config.parts import LoRA as Settings
from limbeck.config.parts import Optimizer, Policy
from limbeck.engine.rollout import Engine
from limbeck.model.lora import LoRA
from limbeck.train.batch import pack
from limbeck.train.learner import Learner
from limbeck.train.losses import PolicyGradient
from limbeck.types import Sample

from .models import Ids, decoder
from .report import free_memory, note, once, peak, promise
from .training import deterministic, steps

TOKENS = 16_384  # tokens of the timed update


def lora_part(quick: bool) -> None:
    """Learn adapters of rank 16 for three steps with the sampler; then time an update of 16,384 tokens."""
    deterministic()
    model = decoder("0.5B")
    lora = LoRA(model, Settings(), 0)
    learner = Learner(model, Optimizer(learning_rate=1e-3), 6, lora=lora)
    before = model.blocks[0].ffn.down.weight.clone()
    drifts = steps(learner, Engine(model, Ids(), rows=64), 0, 3)
    learned = not torch.equal(before, model.blocks[0].ffn.down.weight)
    note("lora", shape="0.5B", drifts=drifts)
    promise("lora", "adapters learn, and no log-probability differs in any step", learned and not any(drifts))
    del model, lora, learner
    free_memory()
    if not quick:
        deterministic()
        _time_update("4B")


def _time_update(shape: str) -> None:
    """Time updates of one long sequence, and how long merging takes."""
    model = decoder(shape, TOKENS + 256)
    learner = Learner(model, Optimizer(), 10, "keep_attention", LoRA(model, Settings(), 0))
    ids = np.random.default_rng(0).integers(1, 10000, TOKENS + 1)
    sample = Sample(ids, start=1, advantage=1.0, logprobs=np.full(TOKENS, -9.0, np.float32))
    loss = PolicyGradient(Policy(), TOKENS)
    times = [once(lambda: learner.update(pack([sample], 1 << 15, "cuda"), loss)) for _ in range(3)]
    merge_s = once(learner.lora.merge)
    rate = round(TOKENS / min(times))
    note("lora", shape=shape, seconds=min(times), tokens_s=rate, merge_s=merge_s, GiB=peak())
