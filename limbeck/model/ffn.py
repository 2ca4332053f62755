"""Feed-forward layers. N tokens · C hidden · I intermediate."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202, eq. 6); gate and up are one product."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_NC: Tensor) -> Tensor:
        gate_NI, up_NI = self.gate_up(x_NC).chunk(2, dim=-1)
        return self.down(F.silu(gate_NI) * up_NI)
