"""`remote`: an OpenAI-compatible endpoint in the place of a model."""

from __future__ import annotations

import json

from ...config.recipe import Remote
from ..job import Job
from ..store import write
from .outcome import Outcome, outcome


def run(job: Job) -> Outcome:
    """Note the endpoint and its licence. One request is sent, so that a wrong key shows at once."""
    stage: Remote = job.stage
    job.endpoint(job.name).check()
    settings = stage.model_dump(mode="json", include={"url", "model", "licence", "logprobs", "extra"})
    write(job.folder / "endpoint.json", json.dumps(settings, indent=2) + "\n")
    return outcome()
