"""Which function carries out which kind of stage."""

from __future__ import annotations

from . import basic, distillation, judging

STAGES = {**basic.STAGES, **distillation.STAGES, **judging.STAGES}
