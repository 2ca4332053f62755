"""Which function carries out which kind of stage."""

from __future__ import annotations

from . import judging, stages

STAGES = {**stages.STAGES, **judging.STAGES}
