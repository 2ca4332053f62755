"""Published runs: rows of facts with their sources, and what they say about model, cluster and layout.

A row has the columns of `published.csv`. `schedule` holds what has no column: `1f1b;zero1;mbs=2;vpp=6;recompute=full`.
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
SOME = 4_000_000  # tokens a step where none are told
FLASH = 2206  # arXiv's month after FlashAttention (2205.14135); what was measured before has none
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
    """One measurement: `columns` as in the file; what they mean as properties."""

    columns: dict[str, str]
    keys: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, key: str) -> str:
        return self.columns.get(key) or ""

    def number(self, key: str, default: float = 0) -> float:
        try:
            return float(self[key] or default)
        except ValueError:
            raise LimbeckError(f"{self['name']}: {key} = {self[key]!r} is no number") from None

    def integer(self, key: str, default: int = 1) -> int:
        return int(self.number(key, default))

    @property
    def name(self) -> str:
        return self["name"]

    @property
    def metric(self) -> str:
        return self["measured_metric"]

    @property
    def value(self) -> float:
        return self.number("measured_value")

    @property
    def told(self) -> str:
        return self["schedule"].lower()

    @property
    def seq(self) -> int:
        return self.integer("seq", 4096)

    @property
    def chips(self) -> int:
        return self.integer("n_chips", 0)

    @property
    def batch(self) -> int:
        """Sequences a step; where none are told, about four million tokens that every replica has a share of."""
        if told := self.number("global_batch_tokens"):
            return max(1, round(told / self.seq))
        share = 8 * self.integer("dp")
        return -(-SOME // (self.seq * share)) * share

    @property
    def precision(self) -> str:
        first = self["precision"].split("/")[0].lower()
        return first if first in ("fp16", "fp8", "bf16") else "bf16"

    @property
    def complete(self) -> bool:
        """Whether the layout is told."""
        return all(self[key] for key in ("n_chips", "pp", "global_batch_tokens"))

    @cached_property
    def model(self) -> ModelConfig:
        """The model; whether its feed-forward is gated and its head tied is what fits the published parameters best."""
        wanted = self.number("total_params")
        shapes = [self._model(gated, tied) for gated in (True, False) for tied in (False, True)]
        return min(shapes, key=lambda shape: abs(shape.parameters - wanted))

    def _model(self, gated: bool, tied: bool) -> ModelConfig:
        heads, hidden = self.integer("heads"), self.integer("hidden")
        ffn = self.integer("ffn", 0) or 4 * hidden
        experts, dense = self._experts()
        return ModelConfig(
            family="llama",
            vocab_size=self.integer("vocab", 32000),
            hidden_size=hidden,
            layers=self.integer("layers"),
            heads=heads,
            kv_heads=self.integer("kv_heads", heads),
            head_dim=int(self.keys.get("hd", 0)) or hidden // heads,
            intermediate_size=dense or ffn,
            tied=tied,
            gated=gated or bool(experts),
            latent=self._latent(),
            experts=experts,
            predicted=int(re.sub(r"\D.*", "", self.keys.get("mtp", "0")) or 0),
        )

    def _latent(self) -> Latent | None:
        found = re.search(r"mla\(q(\d+),kv(\d+),rope(\d+),nope(\d+),v(\d+)\)", self.told)
        if not found:
            return None
        q, kv, rope, nope, value = map(int, found.groups())
        return Latent(kv, nope, rope, value, q)

    def _experts(self) -> tuple[Experts | None, int]:
        """The mixture, and the width of layers that have none."""
        count, layers = self.integer("experts", 0), self.integer("layers")
        if count < 2:
            return None, 0
        size = self.integer("ffn")
        few, wide = re.search(r"dense=(\d+)", self.told), re.search(r"ffn\D?(\d{4,})", self.told)
        dense = tuple(range(int(few[1]))) if few else (0,) if "dense first layer" in self.told else ()
        if "every 2nd layer" in self.told:
            dense = tuple(range(0, layers, 2))
        shared = re.search(r"(\d+) shared expert|shared=(\d+)", self.told)
        number = int(shared[1] or shared[2]) if shared else 0
        width = re.search(r"shared_ffn=(\d+)", self.told)
        limit = re.search(r"node_limit=(\d+)", self.told)
        experts = Experts(
            count,
            self.integer("topk"),
            size,
            int(width[1]) if width else number * size,
            dense=dense,
            groups=8 if limit else 1,
            top_groups=int(limit[1]) if limit else 1,
        )
        return experts, int(wide[1]) if wide else 0

    @property
    def cluster(self) -> Cluster:
        """The chips, and the fabric that the row or its source tells."""
        text = f"{max(1, self.chips)}x{self['chip']}"
        changes: dict[str, object] = {}
        if node := re.search(r"(\d+)gbps/node", self.told):
            changes |= {"nics": max(1, int(node[1]) // 200), "nic": 200}
        if "bigscience" in self["source"] or "211.05100" in self["source"]:
            changes["fabric"] = "omnipath-4x100"
        if "ultrascale" in self["source"]:
            changes["fabric"] = "efa-400"
        if "diloco" in self.told:
            changes["fabric"] = "internet"
        return clusters.cluster(text, **changes)

    @property
    def software(self) -> Software:
        """Tuned unless the row says otherwise: nanotron, FSDP of plain PyTorch and DeepSpeed are eager, and what was
        measured in half precision or before FlashAttention has none."""
        month = re.search(r"arxiv:(\d{4})\.", self["source"].lower())
        told = self.told + self["source"].lower()
        if "zero3" in told and self.integer("pp") == 1 and self.integer("tp") == 1 and "fsdp" not in told:
            return DEEPSPEED
        if (
            self.precision == "fp16"
            or (month and int(month[1]) < FLASH)
            or "bigscience" in told
            or "megatron-deepspeed" in told
        ):
            return EARLY
        if "torchtitan" in told:
            return (
                replace(TITAN, hides_tensor="asynctp" in told)
                if "compile" in told
                else replace(EAGER, balanced=False)
            )
        if "megascale" in self.name.lower() and "megatron" not in self.name.lower():
            return replace(TUNED, hides_tensor=True)  # arXiv 2402.15627, section 3.2
        if "nanotron" in told or "ultrascale" in told:
            return EAGER
        if "haiscale" in told:
            return HAI
        return FSDP if "fsdp" in told and self.integer("pp") == 1 else TUNED

    @cached_property
    def layout(self) -> Layout:
        """As told; a micro-batch or a number of chunks that is not told is the one that the planner would choose."""
        told = self._layout()
        if (
            "local_bs" in self.keys
        ):  # torchtitan makes as many micro-batches of it as there are pipeline ranks
            told = told.change(micro=max(1, int(self.keys["local_bs"]) // told.pp))
        micro = [told.micro] if "mbs" in self.keys or told.micro > 1 else self._micros(told)
        chunks = [told.chunks]
        if told.schedule == "interleaved" and "vpp" not in self.keys:
            chunks = (
                [2]
                if self.software.name == "eager"
                else [n for n in range(2, 9) if -(-self.model.layers // told.pp) % n == 0] or [1]
            )
        tried = [
            told.change(micro=m, chunks=c, schedule=told.schedule if c > 1 else _plain(told))
            for m in micro
            for c in chunks
        ]
        tried = [
            at for at in tried if at.schedule != "interleaved" or at.micro_batches(self.batch) % at.pp == 0
        ] or tried[:1]
        return min(tried, key=self._quick) if len(tried) > 1 else tried[0]

    @property
    def memory(self) -> Memory:
        """What the planner thinks that its chips hold."""
        batch = self.batch if self.number("global_batch_tokens") else 0
        return fit(self.model, self.cluster, self.layout, self.seq, self.software, self.precision, batch)

    def _micros(self, told: Layout) -> list[int]:
        mine = max(1, self.batch // told.dp)
        fitting = [
            m
            for m in (1, 2, 3, 4, 6, 8, 12, 16)
            if mine % m == 0
            and fit(self.model, self.cluster, told.change(micro=m), self.seq, self.software).fits
        ]
        return fitting or [1]

    def _quick(self, layout: Layout) -> float:
        try:
            return (
                foresee(
                    self.model,
                    self.cluster,
                    layout,
                    self.batch,
                    self.seq,
                    self.precision,
                    self.software,
                    exact=False,
                )
                .step()
                .seconds
            )
        except LimbeckError:
            return float("inf")

    def _layout(self) -> Layout:
        pp = self.integer("pp")
        zero = re.search(r"zero-?(\d)", self.told)
        schedule = next((ours for theirs, ours in SCHEDULES.items() if theirs in self.told), "1f1b")
        chunks = int(self.keys.get("vpp", 0) or 0)
        cp = self.integer("cp")
        dp = self.integer("dp", max(1, self.chips // (self.integer("tp") * pp * cp)))
        micro = int(float(self.keys.get("mbs", 0) or 0)) or 1
        if chunks > 1:
            schedule = "interleaved"
        return Layout(
            dp=dp,
            tp=self.integer("tp"),
            pp=pp,
            ep=self.integer("ep"),
            cp=cp,
            zero=3
            if "fsdp" in self.told and "zero2" not in self.told and not zero
            else int(zero[1])
            if zero
            else 1,
            micro=micro,
            schedule="1f1b" if chunks == 1 and schedule == "interleaved" else schedule,
            chunks=max(1, chunks),
            recompute=self._recompute(),
            sp="sp" in self.keys or "tp_mode=red" in self.told or self.software.attention != "unfused",
            expert_tp=int(self.keys.get("etp", 0) or 0),
            overlap="overlap" in self.told
            or (self.integer("ep") > self.cluster.per_node and pp > 1 and self.software.fused),
        )

    def _recompute(self) -> str:
        told = self.keys.get("recompute", "full" if self.metric.startswith("hw_") else "none")
        if told.startswith("selective") and "torchtitan" in self["source"]:
            return "half"  # its "selective op" keeps every second product
        if "mla_up" in told:
            return "v3"
        return next((mode for mode in ("full", "selective") if told.startswith(mode)), "none")


def _plain(layout: Layout) -> str:
    return "1f1b" if layout.schedule == "interleaved" else layout.schedule


def read(path: Path = FILE) -> list[Row]:
    """Rows of a file; one sentence where it is none."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise LimbeckError(
            f"{path}: {error.strerror}; name a table of runs with the columns of {FILE.name}"
        ) from None
    missing = {"name", "measured_metric", "measured_value", "chip"} - set(rows[0] if rows else ())
    if missing:
        raise LimbeckError(
            f"{path}: has no column {', '.join(sorted(missing))}; its columns are to be those of {FILE.name}"
        )
    return [Row(row, _keys(row.get("schedule") or "")) for row in rows]


def _keys(schedule: str) -> dict[str, str]:
    pairs = (token.strip().lower().partition("=") for token in schedule.split(";"))
    return {key: value for key, _, value in pairs if key}
