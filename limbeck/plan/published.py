"""Published runs: measured rows with their sources, and the model, cluster and layout of each.

A row is one measured figure of one run; it has the columns of `published.csv`. Facts that have no column of
their own are in the column `schedule`, as in `1f1b;zero1;mbs=2;vpp=6;recompute=full`.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from ..model.config import Experts, Latent, ModelConfig
from ..types import LimbeckError
from . import cluster as clusters
from .cluster import Cluster
from .layout import Layout
from .memory import Memory, fit
from .roofline import DEEPSPEED, EAGER, EARLY, FSDP, HAI, TITAN, TUNED, Software
from .step import foresee

FILE = Path(__file__).with_name("published.csv")
SOME = 4_000_000  # tokens a step where the row gives none
FLASH = 2206  # arXiv's month (YYMM) after FlashAttention (2205.14135); earlier runs are without it
MICRO_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16)  # sequences of a micro-batch that are tried
CHUNKS = range(2, 9)  # model chunks a chip that are tried for an interleaved schedule
SCHEDULES = {
    "dualpipev": "dualpipev",
    "dualpipe": "dualpipe",
    "zb1p": "zb1p",
    "1f1b-interleaved": "interleaved",
    "1f1b": "1f1b",
    "gpipe": "gpipe",
}


@dataclass(frozen=True)
class Row:
    """One measured figure of one published run.

    `columns` has the texts of the file's columns, and `keys` the `key=value` pairs of the column `schedule`.
    """

    columns: dict[str, str]
    keys: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, key: str) -> str:
        """Return the text of a column, or an empty string if the row has none."""
        return self.columns.get(key) or ""

    def number(self, key: str, default: float = 0) -> float:
        """Return the number in a column, or `default` if it is empty.

        Raises LimbeckError if it is no number.
        """
        try:
            return float(self[key] or default)
        except ValueError:
            raise LimbeckError(f"{self['name']}: {key} = {self[key]!r} is no number") from None

    def integer(self, key: str, default: int = 1) -> int:
        """Return the number in a column, rounded down, or `default` if it is empty."""
        return int(self.number(key, default))

    @property
    def name(self) -> str:
        """The name of the run."""
        return self["name"]

    @property
    def metric(self) -> str:
        """The name of the metric that was measured, such as `step_time_s`."""
        return self["measured_metric"]

    @property
    def value(self) -> float:
        """The measured value, in the unit of its metric."""
        return self.number("measured_value")

    @property
    def schedule(self) -> str:
        """The text of the column `schedule`, in lower case."""
        return self["schedule"].lower()

    @property
    def seq(self) -> int:
        """The number of tokens of a sequence; 4096 if the row gives none."""
        return self.integer("seq", 4096)

    @property
    def chips(self) -> int:
        """The number of chips; 0 if the row gives none."""
        return self.integer("n_chips", 0)

    @property
    def batch(self) -> int:
        """The number of sequences of a step.

        If the row gives none, it is about four million tokens, as a multiple of eight sequences for each
        data-parallel replica.
        """
        tokens = self.number("global_batch_tokens")
        if tokens:
            return max(1, round(tokens / self.seq))
        share = 8 * self.integer("dp")
        return -(-SOME // (self.seq * share)) * share

    @property
    def precision(self) -> str:
        """The precision of the matrix products: `fp16`, `fp8` or, by default, `bf16`."""
        first = self["precision"].split("/")[0].lower()
        return first if first in ("fp16", "fp8", "bf16") else "bf16"

    @property
    def complete(self) -> bool:
        """True if the row gives its number of chips, its pipeline parallelism and its batch size."""
        return all(self[key] for key in ("n_chips", "pp", "global_batch_tokens"))

    @property
    def unsplit(self) -> bool:
        """True if neither pipeline nor tensor parallelism is used."""
        return self.integer("pp") == 1 and self.integer("tp") == 1

    # ------------------------------------------------------------ model

    @cached_property
    def model(self) -> ModelConfig:
        """The configuration of the model.

        Rows do not say whether the feed-forward network is gated and whether the output matrix is tied to the
        embedding: the choice whose number of parameters is nearest to the published number is taken.
        """
        published = self.number("total_params")
        shapes: list[ModelConfig] = []
        for gated in (True, False):
            for tied in (False, True):
                shapes.append(self._model(gated, tied))
        return min(shapes, key=lambda shape: abs(shape.parameters - published))

    def _model(self, gated: bool, tied: bool) -> ModelConfig:
        """Return the model with the given choices: a gated feed-forward network, a tied output matrix."""
        vocabulary = self.integer("vocab", 32000)
        layers = self.integer("layers")
        heads = self.integer("heads")
        kv_heads = self.integer("kv_heads", heads)
        hidden = self.integer("hidden")
        head_dim = int(self.keys.get("hd", 0)) or hidden // heads
        ffn = self.integer("ffn", 0) or 4 * hidden
        experts = self._experts()
        dense = self._dense_width() if experts else 0
        mtp_layers = re.sub(r"\D.*", "", self.keys.get("mtp", "0"))
        return ModelConfig(
            family="llama",
            vocab_size=vocabulary,
            hidden_size=hidden,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate_size=dense or ffn,
            tied=tied,
            gated=gated or bool(experts),
            latent=self._latent(),
            experts=experts,
            predicted=int(mtp_layers or 0),
        )

    def _latent(self) -> Latent | None:
        """Return the sizes of latent attention; None if the model has another kind of attention.

        They are written as `mla(q1536,kv512,rope64,nope128,v128)` in the column `schedule`.
        """
        match = re.search(r"mla\(q(\d+),kv(\d+),rope(\d+),nope(\d+),v(\d+)\)", self.schedule)
        if not match:
            return None
        q, kv, rope, nope, value = map(int, match.groups())
        return Latent(kv, nope, rope, value, q)

    def _experts(self) -> Experts | None:
        """Return the mixture of experts; None for a dense model."""
        count = self.integer("experts", 0)
        if count < 2:
            return None
        size = self.integer("ffn")
        shared = self._find_integer(r"(\d+) shared expert|shared=(\d+)") or 0
        shared_size = self._find_integer(r"shared_ffn=(\d+)")
        node_limit = self._find_integer(r"node_limit=(\d+)")
        if shared_size is None:
            shared_size = shared * size
        top_k = self.integer("topk")
        return Experts(
            count,
            top_k,
            size,
            shared_size,
            dense=self._dense_layers(),
            groups=1 if node_limit is None else 8,
            top_groups=1 if node_limit is None else node_limit,
        )

    def _dense_layers(self) -> tuple[int, ...]:
        """Return the indices of the layers of a mixture that have no experts."""
        if "every 2nd layer" in self.schedule:
            return tuple(range(0, self.integer("layers"), 2))
        count = self._find_integer(r"dense=(\d+)")
        if count is not None:
            return tuple(range(count))
        return (0,) if "dense first layer" in self.schedule else ()

    def _dense_width(self) -> int:
        """Return the feed-forward size of the mixture's layers without experts; 0 if the row gives none."""
        return self._find_integer(r"ffn\D?(\d{4,})") or 0

    def _find_integer(self, pattern: str) -> int | None:
        """Search the column `schedule` for `pattern` and return the integer of the group that matched.

        The result is None if the pattern is not found.
        """
        match = re.search(pattern, self.schedule)
        return int(match[match.lastindex]) if match else None

    # ------------------------------------------------------------ cluster and software

    @property
    def cluster(self) -> Cluster:
        """The chips of the run, with the network that the row or its source states."""
        changes: dict[str, object] = {}
        node_gbps = self._find_integer(r"(\d+)gbps/node")
        if node_gbps is not None:
            changes["nics"] = max(1, node_gbps // 200)
            changes["nic"] = 200
        if "bigscience" in self["source"] or "211.05100" in self["source"]:
            changes["fabric"] = "omnipath-4x100"
        if "ultrascale" in self["source"]:
            changes["fabric"] = "efa-400"
        if "diloco" in self.schedule:
            changes["fabric"] = "internet"
        return clusters.cluster(f"{max(1, self.chips)}x{self['chip']}", **changes)

    @property
    def software(self) -> Software:
        """The properties of the training software; `TUNED` by default.

        nanotron, FSDP of plain PyTorch and DeepSpeed are eager (not fused by a compiler). Runs in fp16 and
        runs before FlashAttention have unfused attention.
        """
        text = self.schedule + self["source"].lower()
        name = self.name.lower()
        if "zero3" in text and self.unsplit and "fsdp" not in text:
            return DEEPSPEED
        if self.precision == "fp16" or self._before_flash(text):
            return EARLY
        if "torchtitan" in text:
            return _torchtitan(text)
        if "megascale" in name and "megatron" not in name:
            return replace(TUNED, hides_tensor=True)  # arXiv 2402.15627, section 3.2
        if "nanotron" in text or "ultrascale" in text:
            return EAGER
        if "haiscale" in text:
            return HAI
        return FSDP if "fsdp" in text and self.integer("pp") == 1 else TUNED

    def _before_flash(self, text: str) -> bool:
        """Return True if the run is older than FlashAttention, by its arXiv number or its software.

        `text` is the row's schedule and source in lower case.
        """
        month = re.search(r"arxiv:(\d{4})\.", self["source"].lower())
        if month and int(month[1]) < FLASH:
            return True
        return "bigscience" in text or "megatron-deepspeed" in text

    # ------------------------------------------------------------ layout and memory

    @cached_property
    def layout(self) -> Layout:
        """The published layout.

        If the micro-batch or the number of chunks is not published, it is chosen such that the forecast of
        the step is shortest.
        """
        published = self._layout()
        if "local_bs" in self.keys:
            # torchtitan makes as many micro-batches of it as there are pipeline ranks
            published = published.change(micro=max(1, int(self.keys["local_bs"]) // published.pp))
        layouts: list[Layout] = []
        for micro in self._micros(published):
            for chunks in self._chunks(published):
                schedule = published.schedule if chunks > 1 else _plain(published)
                layouts.append(published.change(micro=micro, chunks=chunks, schedule=schedule))
        possible = [layout for layout in layouts if self._divides(layout)]
        possible = possible or layouts[:1]
        return min(possible, key=self._quick) if len(possible) > 1 else possible[0]

    @property
    def memory(self) -> Memory:
        """The planner's forecast of the memory on the chip that needs the most."""
        batch = self.batch if self.number("global_batch_tokens") else 0
        return fit(self.model, self.cluster, self.layout, self.seq, self.software, self.precision, batch)

    def _divides(self, layout: Layout) -> bool:
        """Return True if the schedule is possible with this number of micro-batches.

        An interleaved schedule needs a multiple of the number of pipeline ranks.
        """
        if layout.schedule != "interleaved":
            return True
        return layout.micro_batches(self.batch) % layout.pp == 0

    def _micros(self, published: Layout) -> list[int]:
        """Return the micro-batch sizes to try, in sequences.

        It is the published one if there is one; otherwise all that divide the sequences of a replica and fit
        in memory.
        """
        if "mbs" in self.keys or published.micro > 1:
            return [published.micro]
        sequences = max(1, self.batch // published.dp)
        micros: list[int] = []
        for micro in MICRO_BATCHES:
            if sequences % micro == 0:
                layout = published.change(micro=micro)
                if fit(self.model, self.cluster, layout, self.seq, self.software).fits:
                    micros.append(micro)
        return micros or [1]

    def _chunks(self, published: Layout) -> list[int]:
        """Return the numbers of chunks a chip to try.

        It is the published one if there is one, and 2 for eager software; otherwise all that divide the
        layers of a pipeline rank.
        """
        if published.schedule != "interleaved" or "vpp" in self.keys:
            return [published.chunks]
        if self.software.name == "eager":
            return [2]
        rank_layers = -(-self.model.layers // published.pp)
        return [chunks for chunks in CHUNKS if rank_layers % chunks == 0] or [1]

    def _quick(self, layout: Layout) -> float:
        """Return the forecast seconds of a step by the schedule's formula.

        The result is infinite if the layout is impossible.
        """
        try:
            plan = foresee(
                self.model,
                self.cluster,
                layout,
                self.batch,
                self.seq,
                self.precision,
                self.software,
                exact=False,
            )
            return plan.step().seconds
        except LimbeckError:
            return float("inf")

    def _layout(self) -> Layout:
        """Return the layout as far as the row gives it, with defaults for the rest."""
        tp = self.integer("tp")
        pp = self.integer("pp")
        cp = self.integer("cp")
        chunks = int(self.keys.get("vpp", 0) or 0)
        micro = int(float(self.keys.get("mbs", 0) or 0))
        expert_tp = int(self.keys.get("etp", 0) or 0)
        dp = self.integer("dp", max(1, self.chips // (tp * pp * cp)))
        return Layout(
            dp=dp,
            tp=tp,
            pp=pp,
            ep=self.integer("ep"),
            cp=cp,
            zero=self._zero(),
            micro=micro or 1,
            schedule=self._schedule(chunks),
            chunks=max(1, chunks),
            recompute=self._recompute(),
            sp=self._sequence_parallel(),
            expert_tp=expert_tp,
            overlap=self._overlap(),
        )

    def _zero(self) -> int:
        """Return the stage of ZeRO. FSDP without a stated stage counts as 3, everything else as 1."""
        zero = self._find_integer(r"zero-?(\d)")
        if zero is not None:
            return zero
        return 3 if "fsdp" in self.schedule else 1

    def _schedule(self, chunks: int) -> str:
        """Return the name in `layout.SCHEDULES` of the pipeline schedule.

        `chunks` is the number of chunks a chip, 0 if the row gives none.
        """
        if chunks > 1:
            return "interleaved"
        for name, schedule in SCHEDULES.items():
            if name in self.schedule:
                return "1f1b" if chunks == 1 and schedule == "interleaved" else schedule
        return "1f1b"

    def _sequence_parallel(self) -> bool:
        """Return True if activations between layers are split along the sequence."""
        stated = "sp" in self.keys or "tp_mode=red" in self.schedule
        return stated or self.software.attention != "unfused"

    def _overlap(self) -> bool:
        """Return True if the experts' all-to-all overlaps with computing.

        If the row does not say so, it is assumed for tuned software with a pipeline and expert groups larger
        than a node.
        """
        if "overlap" in self.schedule:
            return True
        wide = self.integer("ep") > self.cluster.per_node
        return wide and self.integer("pp") > 1 and self.software.fused

    def _recompute(self) -> str:
        """Return the name in `layout.RECOMPUTE` of the recomputation mode."""
        mode = self.keys.get("recompute", "full" if self.metric.startswith("hw_") else "none")
        if mode.startswith("selective") and "torchtitan" in self["source"]:
            return "half"  # its "selective op" keeps every second product
        if "mla_up" in mode:
            return "v3"
        for known in ("full", "selective"):
            if mode.startswith(known):
                return known
        return "none"


def _torchtitan(text: str) -> Software:
    """Return the properties of torchtitan, compiled or not, as `text` says.

    Asynchronous tensor parallelism is assumed if `text` has "asynctp".
    """
    if "compile" in text:
        return replace(TITAN, hides_tensor="asynctp" in text)
    return replace(EAGER, balanced=False)


def _plain(layout: Layout) -> str:
    """Return the name of the schedule that this layout has with one chunk a chip."""
    return "1f1b" if layout.schedule == "interleaved" else layout.schedule


def read(path: Path = FILE) -> list[Row]:
    """Return the rows of a CSV file. Raises LimbeckError if it cannot be read or lacks a required column."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise LimbeckError(
            f"{path}: {error.strerror}; name a table of runs with the columns of {FILE.name}"
        ) from None
    columns = set(rows[0]) if rows else set()
    missing = {"name", "measured_metric", "measured_value", "chip"} - columns
    if missing:
        names = ", ".join(sorted(missing))
        raise LimbeckError(f"{path}: has no column {names}; its columns are to be those of {FILE.name}")
    return [Row(row, _keys(row.get("schedule") or "")) for row in rows]


def _keys(schedule: str) -> dict[str, str]:
    """Return the `key=value` pairs of a text such as `1f1b;mbs=2`.

    A word alone becomes a key with an empty value.
    """
    keys: dict[str, str] = {}
    for token in schedule.split(";"):
        key, _, value = token.strip().lower().partition("=")
        if key:
            keys[key] = value
    return keys
