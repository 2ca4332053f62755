"""Which function carries out which kind of stage."""

from __future__ import annotations

from . import distillation, stages

STAGES = {**stages.STAGES, **distillation.STAGES}
