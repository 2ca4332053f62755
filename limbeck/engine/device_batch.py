"""A decode batch whose state lies on the model's device: no step of it waits for the host.

The host replays steps and looks at the rows every `POLL` steps only; on an NVIDIA card a step is one CUDA
graph, captured once for each number of rows in `BUCKETS`. A completion does not depend on which other rows are
in the batch. B rows · N tokens · T tokens of a completion · C hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..model.decoder import Decoder
from ..model.ops.plain import BLOCK
from ..model.paged import PagedCache
from .decode_batch import FinishedSequence
from .sampling import SamplingParams

POLL = 16  # steps between two looks at the rows
PREFILL = 1 << 15  # tokens of prompts that are run at once
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # rows of a captured step


class DeviceBatch:
    """A batch of at most `rows` sequences, of which each step samples one token per row.

    `blocks` is the number of blocks of the pool of keys and values. The first blocks of the pool take what
    rows that have ended still write.
    """

    drafted = 0
    accepted = 0

    def __init__(
        self, model: Decoder, end_id: int, sampling: SamplingParams, rows: int, longest: int, blocks: int = 0
    ):
        config = model.config
        weight = model.embed.weight
        device = weight.device
        tokens = sampling.max_new_tokens
        self.model = model
        self.sampling = sampling
        self.device = device
        self.rows = rows
        self.stop_token_ids = {end_id, *sampling.stop_ids}
        stops_V = torch.zeros(max(config.vocab_size, max(self.stop_token_ids) + 1), dtype=torch.bool)
        stops_V[list(self.stop_token_ids)] = True
        self.is_stop_V = stops_V.to(device)
        self.width = -(-(longest + tokens) // BLOCK)  # blocks of the longest row
        spare = -(-rows // BLOCK)
        self.cache = PagedCache(config, weight.dtype, device, spare + (blocks or rows * self.width))
        self.free = list(range(spare + (blocks or rows * self.width) - 1, spare - 1, -1))
        self.readers: dict[int, int] = {}  # rows that read a block
        self.owners: list[tuple[int, int]] = []
        self.held: list[list[int]] = []  # the blocks of each row

        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.tokens_BT = zeros(rows, tokens)
        self.logprobs_BT = zeros(rows, tokens, dtype=torch.float32)
        self.uniforms_BT = zeros(rows, tokens, dtype=torch.float32)
        self.sampled_B = zeros(rows)
        self.limits_B = zeros(rows)  # tokens after which each row ends
        self.alive_B = zeros(rows, dtype=torch.bool)
        self.lengths_B = zeros(rows, dtype=torch.int32)  # tokens of each row in the cache
        self.table = zeros(rows, self.width, dtype=torch.int32)
        self.hidden_BC = zeros(rows, config.hidden_size, dtype=weight.dtype)
        self.trash_B = torch.arange(rows, device=device)
        self.starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.steps: dict[int, Callable[[], None]] = {}

    @property
    def busy(self) -> int:
        """The number of rows in the batch, including rows that have ended since the last look."""
        return len(self.owners)

    # ------------------------------------------------------------ rows

    def admit(
        self,
        prompts: list[tuple[int, np.ndarray]],
        uniforms_BT: np.ndarray,
        n: int,
        limits: list[int] | None = None,
    ) -> None:
        """Prefill prompts and fork each into `n` rows; arguments as in `DecodeBatch.admit`.

        `limits` are the numbers of tokens after which each prompt's rows end (None: `max_new_tokens`).
        """
        first = self.busy
        limits = limits or [self.sampling.max_new_tokens] * len(prompts)
        count = len(prompts) * n
        part = slice(first, first + count)
        lengths = [len(tokens) for _, tokens in prompts]
        table = np.zeros((count, self.width), dtype=np.int32)
        copies: list[tuple[int, int]] = []
        for place, (problem, tokens) in enumerate(prompts):
            whole = len(tokens) // BLOCK
            shared = self._take(whole, n)
            for sample in range(n):
                row = place * n + sample
                blocks = shared + self._take(-(-(len(tokens) + limits[place]) // BLOCK) - whole, 1)
                table[row, : len(blocks)] = BLOCK * np.array(blocks)
                self.owners.append((problem, sample))
                self.held.append(blocks)
                if sample and len(tokens) % BLOCK:
                    copies.append((self.held[-1 - sample][whole], blocks[whole]))
        self.table[part] = torch.from_numpy(table).to(self.device)
        last_BC = self._prefill_all([tokens for _, tokens in prompts], table[::n])
        self._copy_blocks(copies)
        self.hidden_BC[part] = last_BC.repeat_interleave(n, 0)
        self.lengths_B[part] = torch.tensor(lengths, dtype=torch.int32).repeat_interleave(n).to(self.device)
        self.uniforms_BT[part] = torch.from_numpy(uniforms_BT).float().to(self.device)
        self.sampled_B[part] = 0
        self.limits_B[part] = torch.tensor(limits).repeat_interleave(n).to(self.device)
        self.alive_B[part] = True

    def _needed(self, prompt: int) -> int:
        """Return the number of blocks of a row whose prompt has so many tokens."""
        return -(-(prompt + self.sampling.max_new_tokens) // BLOCK)

    def room(self, prompt: int, n: int) -> bool:
        """Return True if the pool has the blocks of `n` rows with a prompt of so many tokens."""
        return len(self.free) >= n * self._needed(prompt)

    def _take(self, count: int, readers: int) -> list[int]:
        """Return `count` free blocks, which `readers` rows are going to read."""
        blocks = [self.free.pop() for _ in range(count)]
        self.readers.update(dict.fromkeys(blocks, readers))
        return blocks

    def _release(self, blocks: list[int]) -> None:
        """Give back a row's blocks; those that no other row reads become free."""
        for block in blocks:
            self.readers[block] -= 1
            if not self.readers[block]:
                del self.readers[block]
                self.free.append(block)

    def _prefill_all(self, prompts: list[np.ndarray], table: np.ndarray) -> Tensor:
        """Run prompts through the model, at most `PREFILL` tokens at once; arguments as in `_prefill`."""
        hidden = []
        begin = 0
        while begin < len(prompts):
            end = begin + 1
            tokens = len(prompts[begin])
            while end < len(prompts) and tokens + len(prompts[end]) <= PREFILL:
                tokens += len(prompts[end])
                end += 1
            hidden.append(self._prefill(prompts[begin:end], table[begin:end]))
            begin = end
        return torch.cat(hidden)

    def _prefill(self, prompts: list[np.ndarray], table: np.ndarray) -> Tensor:
        """Run prompts through the model, into the blocks of `table`; return their last hidden states [B, C]."""
        lengths = np.array([len(tokens) for tokens in prompts])
        starts = np.concatenate([[0], lengths.cumsum()])
        rows = np.repeat(np.arange(len(prompts)), lengths)
        positions = np.arange(starts[-1]) - starts[rows]
        slots = table[rows, positions // BLOCK] + positions % BLOCK

        def on_device(array: np.ndarray, dtype: torch.dtype) -> Tensor:
            return torch.from_numpy(array).to(dtype).to(self.device)

        self.cache.lay(
            on_device(positions, torch.long),
            on_device(slots, torch.long),
            on_device(table, torch.int32),
            on_device(starts, torch.int32),
            on_device(lengths, torch.int32),
            max(2, int(lengths.max())),
        )
        hidden_NC = self.model(on_device(np.concatenate(prompts), torch.long), self.cache)
        return hidden_NC[on_device(starts[1:] - 1, torch.long)]

    def _copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy blocks of the pool, each from the first to the second index of a pair."""
        if not copies:
            return
        pairs = torch.tensor(copies, device=self.device)
        places = torch.arange(BLOCK, device=self.device)
        source, target = ((BLOCK * pairs[:, i, None] + places).flatten() for i in (0, 1))
        for pool in (self.cache.keys, self.cache.values):
            pool[:, target] = pool[:, source]

    # ------------------------------------------------------------ steps

    def step(self) -> list[FinishedSequence]:
        """Run `POLL` steps; remove and return the rows that have ended."""
        rows = next((bucket for bucket in BUCKETS if bucket >= self.busy), self.rows)
        rows = min(rows, self.rows)
        self.alive_B[self.busy :] = False
        if rows not in self.steps:
            self.steps[rows] = self._capture(rows)
        for _ in range(POLL):
            self.steps[rows]()
        return self._remove_finished()

    def _capture(self, rows: int) -> Callable[[], None]:
        """Return a function that runs a step of `rows` rows: on a card the replay of a CUDA graph."""
        if self.device.type != "cuda":
            return lambda: self._step(rows)
        alive_B = self.alive_B.clone()
        hidden_BC = self.hidden_BC.clone()
        self.alive_B.zero_()  # rows that have ended keep their state
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(rows)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step(rows)
        self.alive_B.copy_(alive_B)
        self.hidden_BC.copy_(hidden_BC)
        return graph.replay

    def _step(self, rows: int) -> None:
        """Sample one token for each of the first `rows` rows, and run it through the model, in place."""
        alive_B = self.alive_B[:rows]
        sampled_B = self.sampled_B[:rows]
        lengths_B = self.lengths_B[:rows]
        table = self.table[:rows]
        logits_BV = self.model.ops.logits(self.hidden_BC[:rows], self.model.head.weight)
        place_B1 = sampled_B.clamp(max=self.tokens_BT.shape[1] - 1).unsqueeze(1)
        uniform_B = self.uniforms_BT[:rows].gather(1, place_B1).squeeze(1)
        tokens_B, logprobs_B = self.model.ops.draw(logits_BV, uniform_B, self.sampling.temperature)
        for drawn_B, kept_BT in ((tokens_B, self.tokens_BT[:rows]), (logprobs_B, self.logprobs_BT[:rows])):
            old_B = kept_BT.gather(1, place_B1).squeeze(1)
            new_B = torch.where(alive_B, drawn_B.to(kept_BT.dtype), old_B)
            kept_BT.scatter_(1, place_B1, new_B.unsqueeze(1))
        sampled_B.add_(alive_B)
        ended_B = self.is_stop_V[tokens_B] | (sampled_B >= self.limits_B[:rows])
        alive_B.logical_and_(~ended_B)
        positions_B = lengths_B.long()
        block_B = (positions_B // BLOCK).clamp(max=table.shape[1] - 1)
        slot_B = table.gather(1, block_B.unsqueeze(1)).squeeze(1) + positions_B % BLOCK
        slots_B = torch.where(alive_B, slot_B, self.trash_B[:rows])
        lengths_B.add_(alive_B)
        now_B = lengths_B.clamp(min=1)
        self.cache.lay(positions_B, slots_B, table, self.starts[: rows + 1], now_B, 1)
        self.hidden_BC[:rows] = self.model(tokens_B, self.cache)

    def _remove_finished(self) -> list[FinishedSequence]:
        """Remove the rows that have ended and return their sequences; the other rows move up."""
        alive_B = self.alive_B[: self.busy].cpu().numpy()
        ended = (~alive_B).nonzero()[0]
        if not len(ended):
            return []
        index = torch.from_numpy(ended).to(self.device)
        sampled = self.sampled_B[index].cpu().tolist()
        tokens = self.tokens_BT[index].cpu().numpy()
        logprobs = self.logprobs_BT[index].cpu().numpy()
        finished = []
        for row, length, ids, values in zip(ended.tolist(), sampled, tokens, logprobs, strict=True):
            self._release(self.held[row])
            finished.append(
                FinishedSequence(*self.owners[row], ids[:length].copy(), values[:length].copy(), None, None)
            )
        self._select_rows(alive_B.nonzero()[0])
        return finished

    def _select_rows(self, rows: np.ndarray) -> None:
        """Keep only the rows with these indices, in this order."""
        index = torch.from_numpy(rows).to(self.device)
        for state in (
            self.tokens_BT,
            self.logprobs_BT,
            self.uniforms_BT,
            self.sampled_B,
            self.limits_B,
            self.alive_B,
            self.lengths_B,
            self.table,
            self.hidden_BC,
        ):
            state[: len(rows)] = state[index]
        self.owners = [self.owners[row] for row in rows.tolist()]
        self.held = [self.held[row] for row in rows.tolist()]
