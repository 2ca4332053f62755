"""Parts of the workers with TRL's trainers: the model, a callback that takes turns, quiet settings."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from turns import SETTINGS, Clock, say, wait

torch.set_num_threads(SETTINGS["threads"])
tokenizer = AutoTokenizer.from_pretrained(SETTINGS["model"])

QUIET = {
    "output_dir": "/tmp/limbeck-bench-trl",
    "use_cpu": True,
    "bf16": False,
    "fp16": False,
    "gradient_checkpointing": False,
    "logging_steps": 10**9,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
ENDLESS = {"learning_rate": 1e-6, "max_steps": 1000}


def load(name: str = "model") -> torch.nn.Module:
    """The model in float32."""
    return AutoModelForCausalLM.from_pretrained(SETTINGS[name], dtype=torch.float32)


class Turns(TrainerCallback):
    """Waits before every turn of so many steps, and lets `tell` say how the last one was, given its clock."""

    def __init__(self, tell: Callable[[Clock], None], steps: int = 1):
        self.tell, self.steps, self.begun, self.clock = tell, steps, 0, None

    def on_step_begin(self, *_, **__):
        """Report the last turn and wait for the next one."""
        if self.begun % self.steps == 0:
            self.tell(self.clock) if self.clock else say(ready=1)
            wait()
            self.clock = Clock()
        self.begun += 1


def counted(trainer: type, mask: str, padding: int) -> tuple[type, list[tuple[int, float]]]:
    """The trainer, and a list of each step's tokens, those of `mask` that are not `padding`, and its loss."""
    seen: list[tuple[int, float]] = []

    class Counted(trainer):
        def compute_loss(self, model, inputs, *args, **more):
            loss = super().compute_loss(model, inputs, *args, **more)
            seen.append(
                (
                    int((inputs[mask] != padding).sum()),
                    float((loss if torch.is_tensor(loss) else loss[0]).detach()),
                )
            )
            return loss

    return Counted, seen
