"""One module per kind of stage. Each has a function `run(job)` that reads the job's inputs and settings and
writes the result files into the job's folder."""

from __future__ import annotations

from collections.abc import Callable

from ..job import Job
from . import (
    calibrate,
    curate,
    distill,
    dpo,
    evaluate,
    general,
    label,
    load,
    pairs,
    pretrain,
    remote,
    reward_model,
    rl,
    sample,
    screen,
    sft,
)
from .outcome import Outcome

STAGES: dict[str, Callable[[Job], Outcome]] = {
    "load": load.run,
    "remote": remote.run,
    "pretrain": pretrain.run,
    "sft": sft.run,
    "rl": rl.run,
    "screen": screen.run,
    "sample": sample.run,
    "curate": curate.run,
    "general": general.run,
    "label": label.run,
    "pairs": pairs.run,
    "dpo": dpo.run,
    "distill": distill.run,
    "calibrate": calibrate.run,
    "reward": reward_model.run,
    "evaluate": evaluate.run,
}
