"""LoRA on a card: the sampler beside a learner of adapters, and an update of a 4B shape."""

from __future__ import annotations

import torch

from limbeck.config.parts import LoRA as Settings
from limbeck.config.parts import Optimizer, Policy
from limbeck.engine.rollout import Engine
from limbeck.model.lora import LoRA
from limbeck.train.batch import pack
from limbeck.train.learner import Learner
from limbeck.train.losses import PolicyGradient

from .card import Card
from .models import Ids, decoder
from .report import note, promise, spare
from .training import random_samples, steps


def lora_part(card: Card, quick: bool) -> None:
    """Learn adapters of rank 16 for three steps with the sampler; then time an update of 16,384 tokens."""
    card.deterministic()
    model = decoder(card, "0.5B")
    lora = LoRA(model, Settings(), 0)
    learner = Learner(model, Optimizer(learning_rate=1e-3), 6, lora=lora)
    before = model.blocks[0].ffn.down.weight.clone()
    drifts = steps(card, learner, Engine(model, Ids(), rows=64), 0, card.size(3, 2))
    learned = not torch.equal(before, model.blocks[0].ffn.down.weight)
    note("lora", shape="0.5B", drifts=drifts)
    promise("lora", "adapters learn, and no log-probability differs in any step", learned and not any(drifts))
    del model, lora, learner
    card.free()
    if not quick and spare("lora", "an update of the 4B shape", card.size(6, 0)):
        card.deterministic()
        _time_update(card, "4B", card.size(16_384, 100))


def _time_update(card: Card, shape: str, tokens: int) -> None:
    """Time updates of one long sequence, and how long merging takes."""
    model = decoder(card, shape, tokens + 256)
    learner = Learner(model, Optimizer(), 10, "keep_attention", LoRA(model, Settings(), 0))
    samples = random_samples(card, [tokens])
    loss = PolicyGradient(Policy(), tokens)

    def update() -> None:
        learner.update(pack(samples, 1 << 15, card.device), loss)

    seconds = min(card.once(update) for _ in range(3))
    told = {"tokens_s": round(tokens / seconds), "merge_s": card.once(learner.lora.merge), "GiB": card.peak()}
    note("lora", shape=shape, tokens=tokens, seconds=seconds, **told)
