"""The peak memory of updates with the settings that save it, beside what `limbeck plan` forecasts."""

from __future__ import annotations

import torch

from limbeck.config.parts import LoRA as LoRASettings
from limbeck.config.parts import Optimizer, Policy
from limbeck.model.config import ModelConfig
from limbeck.model.lora import LoRA
from limbeck.train.batch import pack
from limbeck.train.learner import Learner
from limbeck.train.losses import PolicyGradient

from .card import Card
from .models import decoder
from .report import note, promise, spare
from .training import random_samples

SHAPE = "1.5B"
WITHIN = 0.1  # share by which a forecast may miss a peak
SETTINGS: dict[str, dict] = {
    "masters and moments in float32": {},
    "moments in 8 bits": {"moments": "int8"},
    "8 bits and no masters": {"moments": "int8", "masters": False},
    "on the host": {"offload": True},
}


def memory_part(card: Card, quick: bool) -> None:
    """Measure the peak of updates of 8,192 tokens in a 1.5B shape, and their time, with each setting."""
    for name, settings in SETTINGS.items():
        if unknown := set(settings) - set(Optimizer.model_fields):
            note(
                "memory", setting=name, left_out=f"the optimizer has no setting {', '.join(sorted(unknown))}"
            )
        elif not (quick and settings) and spare("memory", name, card.size(6, 0)):
            _measure(card, name, settings, None)
        card.free()
    if spare("memory", "LoRA", card.size(6, 0)):
        _measure(card, "LoRA of rank 16", {}, LoRASettings())
    card.free()


def _measure(card: Card, name: str, settings: dict, adapters: LoRASettings | None) -> None:
    """Time two updates with one setting, and compare their peak with the forecast."""
    tokens = card.size(8192, 60)
    optimizer = Optimizer(**settings)
    card.deterministic()
    model = card.place(decoder(card, SHAPE, tokens + 256), dtype=torch.bfloat16)
    lora = LoRA(model, adapters, 0) if adapters else None
    learner = Learner(model, optimizer, 10, "keep_attention", lora)
    batches = pack(random_samples(card, [tokens]), 1 << 15, card.device)
    loss = PolicyGradient(Policy(), tokens)
    try:
        seconds = min(card.once(lambda: learner.update(batches, loss)) for _ in range(2))
    except torch.OutOfMemoryError:
        note("memory", setting=name, failed="out of memory")
        return
    peak = card.peak()
    note("memory", setting=name, shape=SHAPE, tokens_s=round(tokens / seconds), GiB=peak)
    forecast = _forecast(model.config, tokens, optimizer, adapters)
    if forecast is not None:
        note("memory", setting=name, forecast_GiB=forecast, of_peak=forecast / peak if peak else 0.0)
        promise(
            "memory", f"{name}: within {WITHIN:.0%} of the forecast", abs(forecast - peak) <= WITHIN * peak
        )


def _forecast(
    sizes: ModelConfig, tokens: int, optimizer: Optimizer, adapters: LoRASettings | None
) -> float | None:
    """Return the planner's forecast of the peak in GiB, without the driver's own; None if it has none."""
    try:
        from limbeck.plan.micro_batch import MicroBatch
        from limbeck.plan.stage_memory import Learning
    except ImportError:
        return None
    batch = MicroBatch(tokens, tokens, tokens, 1, tokens)
    return Learning(sizes, 2, batch, optimizer, "keep_attention", adapters).peak().total / 2**30
