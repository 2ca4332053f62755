"""Which function carries out which kind of stage."""

from __future__ import annotations

from . import distillation, judging, stages

STAGES = {**stages.STAGES, **distillation.STAGES, **judging.STAGES}
