"""`remote`: an OpenAI-compatible endpoint that is used in place of a model."""

from __future__ import annotations

import json

from ...config.recipe import Remote
from ..job import Job
from ..store import write
from .outcome import Outcome, outcome


def run(job: Job) -> Outcome:
    """Write the endpoint's address and licence to `endpoint.json`. One request is sent first, so that a wrong
    API key is noticed at once."""
    stage: Remote = job.stage
    job.endpoint(job.name).check()
    settings = stage.model_dump(mode="json", include={"url", "model", "licence", "logprobs", "extra"})
    write(job.folder / "endpoint.json", json.dumps(settings, indent=2) + "\n")
    return outcome()
