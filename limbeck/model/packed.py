"""Attention contexts of whole sequences: concatenated, or completions that share their stored prompts.

A run: consecutive sequences of similar length that are padded to the longest of them. A tree: a trunk of
tokens (a prompt or a sequence) with the branches that continue it (its completions). N tokens · B sequences ·
T positions of a sequence · S positions with a query · H heads · K key/value heads · D head size · P padded
positions of all sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from . import kernels
from .context import Layer, RouterTrace
from .ops import CPU, Ops
from .ops.plain import causal_attention
from .ops.table import Latents
from .paged import AttentionPlan

# Tokens of a sequence beyond which it is packed alone and does not share its prompt: torch's attention, which
# walks over keys in tiles, is ahead of ours there, and takes whole sequences only (`python -m
# bench.kernels`).
LONG = 3072


class _WholeSequences:
    """What both contexts of whole sequences have in common: attention by the table of operations.

    `kept` and `lent` are as in `Sequences`. `entries`, if it is not None, collects the keys and values of all
    layers.
    """

    absorbed = False
    ops: Ops = CPU

    def __init__(self) -> None:
        self.kept: list[tuple[Tensor, Tensor]] | None = None
        self.entries: list[tuple[Tensor, Tensor | None]] | None = None
        self.routes: RouterTrace | None = None
        self.lent: tuple[Tensor, Tensor] | None = None

    def attend(
        self,
        layer: Layer,
        q_NHD: Tensor,
        k_NKD: Tensor | None,
        v_NKD: Tensor | None,
        latents: Latents | None = None,
    ) -> Tensor:
        """Return causal attention within each sequence, [N, H, D] (see `Context.attend`)."""
        if k_NKD is None:
            k_NKD, v_NKD = self.lent
        else:
            self.lent = (k_NKD, v_NKD) if layer.lends else None
            if self.entries is not None:
                self.entries.append((k_NKD, v_NKD) if latents is None else (latents.cached_N1D, None))
        return self.ops.attend(layer, q_NHD, k_NKD, v_NKD, self, latents)


class Packed(_WholeSequences):
    """Sequences that are concatenated; attention is causal within each of them and never crosses to another.

    Only attention needs padding. For it the sequences are taken in the given order, in runs of similar length
    (callers sort them by length), and each is padded on the right to the longest of its run; causal attention
    keeps the padding from affecting any real position. `slack` is the highest share of padding in a run,
    relative to its real tokens.
    """

    kernel = "attention"

    def __init__(self, lengths: Sequence[int], slack: float = 0.2, device: torch.device | str = "cpu"):
        super().__init__()
        self.lengths = list(lengths)
        self.longest = max(self.lengths)
        self.positions = torch.cat([torch.arange(length) for length in self.lengths]).to(device)
        self.slack = slack
        self.device = device

    @property
    def sequences(self) -> Tensor:
        """The index of the sequence that each token belongs to, [N]."""
        return torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths)).to(self.device)

    @cached_property
    def _runs(self) -> _Runs:
        """The padded runs, which torch's attention takes."""
        return _Runs(self.lengths, self.slack, device=self.device)

    @cached_property
    def plan(self) -> AttentionPlan:
        """The sequences as rows of blocks."""
        return AttentionPlan(self.lengths, self.lengths, None, self.device)

    @cached_property
    def trees(self) -> kernels.Trees:
        """The sequences as trees without branches, which the compiled kernels take."""
        begins = np.cumsum([0, *self.lengths[:-1]])
        return kernels.Trees(begins, self.lengths)

    def keep(self) -> Packed:
        """Make the next forward pass, a prefill, collect all keys and values in `entries`; return self."""
        self.entries = []
        return self

    def attend_padded(self, layer: Layer, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        """Return causal attention within each sequence, [N, H, D], by torch."""
        q_runs = self._runs.pad(q_NHD)
        k_runs = self._runs.pad(k_NKD)
        v_runs = self._runs.pad(v_NKD)
        mixed = [causal_attention(layer, q, k, v) for q, k, v in zip(q_runs, k_runs, v_runs, strict=True)]
        return self._runs.unpad(mixed)


class SharedPrefix(_WholeSequences):
    """Completions with shared prompts: every prompt is stored and computed once.

    The tokens are `prompts` prompts of `width` tokens each, then all completions, concatenated (callers sort
    them by length). `owners[i]` is the index of the prompt that completion i continues, and `lengths[i]` its
    number of tokens. A completion attends to its whole prompt and its own earlier tokens, so gradients equal
    those of the sequences written out in full. `slack` is as in `Packed`.
    """

    kernel = "branches"

    def __init__(
        self,
        prompts: int,
        width: int,
        owners: Sequence[int],
        lengths: Sequence[int],
        slack: float = 0.2,
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        self.device = device
        self.prompts = prompts
        self.width = width
        # empty completions come first and have nothing to attend
        empty = next((i for i, length in enumerate(lengths) if length), len(lengths))
        self.owners = torch.as_tensor(owners[empty:], dtype=torch.long)
        self.lengths = list(lengths[empty:])
        self.longest = width + max(self.lengths, default=0)
        self.slack = slack
        columns = [width + torch.arange(length) for length in self.lengths]
        self.positions = torch.cat([torch.arange(width).repeat(prompts), *columns]).to(device)

    @property
    def sequences(self) -> Tensor:
        """The index of the prompt or completion of each token, [N]; prompts are numbered first."""
        lengths = [self.width] * self.prompts + self.lengths
        return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(self.device)

    @cached_property
    def _runs(self) -> _Runs:
        """The padded runs of completions, which torch's attention takes."""
        return _Runs(self.lengths, self.slack, self.prompts * self.width, self.device)

    @cached_property
    def plan(self) -> AttentionPlan:
        """Prompts and completions as rows of blocks; the keys of a completion begin with its prompt's."""
        prompt_tokens = np.arange(self.prompts * self.width).reshape(self.prompts, self.width)
        begins = self.prompts * self.width + np.cumsum([0, *self.lengths])
        index = [prompt_tokens.ravel()]
        for owner, begin, length in zip(self.owners.tolist(), begins, self.lengths, strict=False):
            index += [prompt_tokens[owner], np.arange(begin, begin + length)]
        queries = [self.width] * self.prompts + self.lengths
        keys = [self.width] * self.prompts + [self.width + length for length in self.lengths]
        return AttentionPlan(queries, keys, np.concatenate(index), self.device)

    @cached_property
    def trees(self) -> kernels.Trees:
        """The prompts as trunks and their completions as branches, which the compiled kernels take."""
        begins = self.prompts * self.width + np.cumsum([0, *self.lengths])[:-1]
        order = self.owners.argsort(stable=True).numpy()
        counts = self.owners.bincount(minlength=self.prompts).tolist()
        trunks = np.arange(self.prompts) * self.width
        lengths = np.asarray(self.lengths, int)
        return kernels.Trees(trunks, [self.width] * self.prompts, counts, begins[order], lengths[order])

    def attend_padded(self, layer: Layer, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        """Return causal attention in each prompt, and of completions to prompt and own past, by torch."""
        q_BHTD, k_BKTD, v_BKTD = (self._prompts_of(x_NHD) for x_NHD in (q_NHD, k_NKD, v_NKD))
        prompts_NHD = causal_attention(layer, q_BHTD, k_BKTD, v_BKTD).transpose(1, 2).flatten(0, 1)
        if not self._runs.cuts:
            return prompts_NHD
        q_runs = self._runs.pad(q_NHD)
        k_runs = self._runs.pad(k_NKD)
        v_runs = self._runs.pad(v_NKD)
        mixed = []
        for (begin, end), q, k, v in zip(self._runs.cuts, q_runs, k_runs, v_runs, strict=True):
            owner = self.owners[begin:end]
            keys = torch.cat([k_BKTD[owner], k], dim=2)
            values = torch.cat([v_BKTD[owner], v], dim=2)
            mixed.append(causal_attention(layer, q, keys, values))
        return torch.cat([prompts_NHD, self._runs.unpad(mixed)])

    def _prompts_of(self, x_NHD: Tensor) -> Tensor:
        """Return the part of `x_NHD` that belongs to the prompts, [B, H, T, D]."""
        prompts_NHD = x_NHD[: self.prompts * self.width]
        return prompts_NHD.view(self.prompts, self.width, *x_NHD.shape[1:]).transpose(1, 2)


class _Runs:
    """Concatenated sequences, cut into runs of similar length; each run is padded to its longest sequence.

    The first sequence begins at token `offset`. `slack` is the highest share of padding in a run, relative to
    its real tokens. One gather per tensor pads all runs, and one gather removes the padding again.
    """

    def __init__(self, lengths: list[int], slack: float, offset: int = 0, device: torch.device | str = "cpu"):
        self.cuts = _cut(lengths, slack) if lengths else []
        self.shapes = [(end - begin, max(lengths[begin:end])) for begin, end in self.cuts]
        self.begin = offset
        self.tokens = sum(lengths)
        self.even = self.tokens == sum(rows * width for rows, width in self.shapes)
        if not self.even:
            source_P, real_N = self._gathers(lengths)
            self.source_P = torch.from_numpy(source_P).to(device)
            self.real_N = torch.from_numpy(real_N).to(device)

    def _gathers(self, lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the token index of each padded position [P], and the padded position of each token [N].

        The index is 0 where the position is padding.
        """
        begins_B = np.cumsum([0, *lengths[:-1]])
        rows = [rows for rows, _ in self.shapes]
        widths_B = np.repeat([width for _, width in self.shapes], rows)
        column_P = np.arange(widths_B.sum()) - np.repeat(np.cumsum(widths_B) - widths_B, widths_B)
        inside_P = column_P < np.repeat(np.asarray(lengths), widths_B)
        source_P = np.where(inside_P, np.repeat(begins_B, widths_B) + column_P, 0)
        return source_P, inside_P.nonzero()[0]

    def pad(self, x_NHD: Tensor) -> list[Tensor]:
        """Return one padded tensor [B, H, T, D] for each run, from the tokens' tensor [N, H, D]."""
        x_NHD = x_NHD.narrow(0, self.begin, self.tokens)
        padded_PHD = x_NHD if self.even else _Gather.apply(x_NHD, self.source_P, self.real_N)
        runs = padded_PHD.split([rows * width for rows, width in self.shapes])
        return [
            run_PHD.view(*shape, *x_NHD.shape[1:]).transpose(1, 2)
            for run_PHD, shape in zip(runs, self.shapes, strict=True)
        ]

    def unpad(self, runs: list[Tensor]) -> Tensor:
        """Return the real positions of the padded runs, concatenated, [N, H, D]."""
        flat = [run_BHTD.transpose(1, 2).flatten(0, 1) for run_BHTD in runs]
        flat_PHD = flat[0] if len(flat) == 1 else torch.cat(flat)
        return flat_PHD if self.even else _Gather.apply(flat_PHD, self.real_N, None)


class _Gather(torch.autograd.Function):
    """`x[index]` with a backward pass that ignores padding.

    `back[i]` is the one position in the result from which entry i of `x` receives its gradient. `back` may be
    None if `index` names no entry twice.
    """

    @staticmethod
    def forward(ctx, x, index, back):
        """Return the entries of x [N, ...] at `index` [P]."""
        ctx.rows = len(x)
        saved = (index,) if back is None else (index, back)
        ctx.save_for_backward(*saved)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        """Return the gradient with respect to x [N, ...]."""
        index, *back = ctx.saved_tensors
        if back:
            return grad.index_select(0, back[0]), None, None
        zeros = grad.new_zeros(ctx.rows, *grad.shape[1:])
        return zeros.index_copy_(0, index, grad), None, None


def _cut(lengths: list[int], slack: float) -> list[tuple[int, int]]:
    """Return runs (begin, end) of sequences; in each the padding is at most `slack` times the real tokens."""
    cuts = []
    first = 0
    longest = 0
    tokens = 0
    for i, length in enumerate(lengths):
        widest = max(longest, length)
        padded = widest * (i - first + 1)
        if i > first and padded > (1 + slack) * (tokens + length):
            cuts.append((first, i))
            first = i
            widest = length
            tokens = 0
        longest = widest
        tokens += length
    return [*cuts, (first, len(lengths))]
