"""Published runs: measured rows with their sources, and the model, cluster and layout of each.

A row has the columns of `published.csv`. Facts without a column are in `schedule`:
`1f1b;zero1;mbs=2;vpp=6;recompute=full`.
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
    """One measurement: `columns` as in the file, and the `keys` of its `schedule`."""

    columns: dict[str, str]
    keys: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, key: str) -> str:
        """The text of a column; empty where the row has none."""
        return self.columns.get(key) or ""

    def number(self, key: str, default: float = 0) -> float:
        """The number in a column. Raises LimbeckError where it is no number."""
        try:
            return float(self[key] or default)
        except ValueError:
            raise LimbeckError(f"{self['name']}: {key} = {self[key]!r} is no number") from None

    def integer(self, key: str, default: int = 1) -> int:
        """The number in a column, rounded down."""
        return int(self.number(key, default))

    @property
    def name(self) -> str:
        """The run's name."""
        return self["name"]

    @property
    def metric(self) -> str:
        """The name of the measured figure."""
        return self["measured_metric"]

    @property
    def value(self) -> float:
        """The measured figure, in the unit of its metric."""
        return self.number("measured_value")

    @property
    def schedule(self) -> str:
        """The text of the column `schedule` in lower case."""
        return self["schedule"].lower()

    @property
    def seq(self) -> int:
        """Tokens of a sequence."""
        return self.integer("seq", 4096)

    @property
    def chips(self) -> int:
        """Number of chips; 0 where the row gives none."""
        return self.integer("n_chips", 0)

    @property
    def batch(self) -> int:
        """Sequences a step; by default about four million tokens, a multiple of eight for each replica."""
        tokens = self.number("global_batch_tokens")
        if tokens:
            return max(1, round(tokens / self.seq))
        share = 8 * self.integer("dp")
        return -(-SOME // (self.seq * share)) * share

    @property
    def precision(self) -> str:
        """`fp16`, `fp8` or `bf16`."""
        first = self["precision"].split("/")[0].lower()
        return first if first in ("fp16", "fp8", "bf16") else "bf16"

    @property
    def complete(self) -> bool:
        """True if the row gives its layout."""
        return all(self[key] for key in ("n_chips", "pp", "global_batch_tokens"))

    @property
    def unsplit(self) -> bool:
        """True if neither layers nor matrices are split over chips."""
        return self.integer("pp") == 1 and self.integer("tp") == 1

    # ------------------------------------------------------------ model

    @cached_property
    def model(self) -> ModelConfig:
        """The model; a gated feed-forward and a tied head are taken as fits the published parameters best."""
        published = self.number("total_params")
        shapes: list[ModelConfig] = []
        for gated in (True, False):
            for tied in (False, True):
                shapes.append(self._model(gated, tied))
        return min(shapes, key=lambda shape: abs(shape.parameters - published))

    def _model(self, gated: bool, tied: bool) -> ModelConfig:
        """The model with a gated feed-forward or not, and a tied head or not."""
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
        """The sizes of latent attention, `mla(q1536,kv512,rope64,nope128,v128)`; None for other attention."""
        match = re.search(r"mla\(q(\d+),kv(\d+),rope(\d+),nope(\d+),v(\d+)\)", self.schedule)
        if not match:
            return None
        q, kv, rope, nope, value = map(int, match.groups())
        return Latent(kv, nope, rope, value, q)

    def _experts(self) -> Experts | None:
        """The mixture of experts; None for a dense model."""
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
        """The layers of a mixture that have no experts."""
        if "every 2nd layer" in self.schedule:
            return tuple(range(0, self.integer("layers"), 2))
        count = self._find_integer(r"dense=(\d+)")
        if count is not None:
            return tuple(range(count))
        return (0,) if "dense first layer" in self.schedule else ()

    def _dense_width(self) -> int:
        """The width of a mixture's layers without experts; 0 where the row gives none."""
        return self._find_integer(r"ffn\D?(\d{4,})") or 0

    def _find_integer(self, pattern: str) -> int | None:
        """The first group of a pattern in the schedule that matched."""
        match = re.search(pattern, self.schedule)
        return int(match[match.lastindex]) if match else None

    # ------------------------------------------------------------ cluster and software

    @property
    def cluster(self) -> Cluster:
        """The chips, with the network that the row or its source gives."""
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
        """The training software, tuned by default.

        nanotron, FSDP of plain PyTorch and DeepSpeed are eager. Runs in fp16 and runs before FlashAttention
        have unfused attention.
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
        """True if the run is older than FlashAttention, by its arXiv number or its software."""
        month = re.search(r"arxiv:(\d{4})\.", self["source"].lower())
        if month and int(month[1]) < FLASH:
            return True
        return "bigscience" in text or "megatron-deepspeed" in text

    # ------------------------------------------------------------ layout and memory

    @cached_property
    def layout(self) -> Layout:
        """The published layout; where micro-batch or chunks are unknown, the planner chooses them."""
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
        """The memory of the fullest chip by the planner."""
        batch = self.batch if self.number("global_batch_tokens") else 0
        return fit(self.model, self.cluster, self.layout, self.seq, self.software, self.precision, batch)

    def _divides(self, layout: Layout) -> bool:
        """True unless an interleaved schedule has micro-batches that its ranks do not divide."""
        if layout.schedule != "interleaved":
            return True
        return layout.micro_batches(self.batch) % layout.pp == 0

    def _micros(self, published: Layout) -> list[int]:
        """The micro-batch of the row; without one, all that divide a replica's sequences and fit."""
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
        """The chunks of the row; without them, all that divide the layers of a pipeline rank."""
        if published.schedule != "interleaved" or "vpp" in self.keys:
            return [published.chunks]
        if self.software.name == "eager":
            return [2]
        rank_layers = -(-self.model.layers // published.pp)
        return [chunks for chunks in CHUNKS if rank_layers % chunks == 0] or [1]

    def _quick(self, layout: Layout) -> float:
        """Seconds of a step by the schedule's formula; infinite where the layout cannot be."""
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
        """The layout as far as the row gives it."""
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
        """The stage of ZeRO; FSDP shards all there is to shard."""
        zero = self._find_integer(r"zero-?(\d)")
        if zero is not None:
            return zero
        return 3 if "fsdp" in self.schedule else 1

    def _schedule(self, chunks: int) -> str:
        """The pipeline schedule by Limbeck's name; `chunks` is 0 where the row gives none."""
        if chunks > 1:
            return "interleaved"
        for name, schedule in SCHEDULES.items():
            if name in self.schedule:
                return "1f1b" if chunks == 1 and schedule == "interleaved" else schedule
        return "1f1b"

    def _sequence_parallel(self) -> bool:
        """True if activations between layers are split along the sequence."""
        stated = "sp" in self.keys or "tp_mode=red" in self.schedule
        return stated or self.software.attention != "unfused"

    def _overlap(self) -> bool:
        """True if the experts' all-to-all overlaps computing; wide groups with a pipeline usually do."""
        if "overlap" in self.schedule:
            return True
        wide = self.integer("ep") > self.cluster.per_node
        return wide and self.integer("pp") > 1 and self.software.fused

    def _recompute(self) -> str:
        """The recomputation mode by Limbeck's name."""
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
    """torchtitan compiled or not, with asynchronous tensor parallelism where the row says so."""
    if "compile" in text:
        return replace(TITAN, hides_tensor="asynctp" in text)
    return replace(EAGER, balanced=False)


def _plain(layout: Layout) -> str:
    """The schedule of a layout with one chunk a chip."""
    return "1f1b" if layout.schedule == "interleaved" else layout.schedule


def read(path: Path = FILE) -> list[Row]:
    """The rows of a file. Raises LimbeckError where it is no table of runs."""
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
    """The `key=value` pairs of a schedule; a word alone is a key with an empty value."""
    keys: dict[str, str] = {}
    for token in schedule.split(";"):
        key, _, value = token.strip().lower().partition("=")
        if key:
            keys[key] = value
    return keys
