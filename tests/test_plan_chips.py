"""Chips and clusters as data: figures with sources, and one sentence where a figure, a chip or a cluster
is not known."""

from __future__ import annotations

import pytest

from limbeck.plan import chips, cluster
from limbeck.plan.constants import constants, provenance
from limbeck.types import LimbeckError


def test_every_figure_has_a_source_and_a_date():
    for chip in chips.catalogue().values():
        assert set(chip.sources) == set(chip.figures)
        assert all(source.text and source.date for source in chip.sources.values())


def test_names_and_units():
    chip = chips.find("H800-SXM")
    assert (chip.name, chip.rate("bf16"), chip.memory, chip.bandwidth, chip.link) == (
        "h800",
        989e12,
        80e9,
        3350e9,
        400e9,
    )
    assert chips.find("A800").link == 400e9 and chips.find("a100-sxm-80gb").link == 600e9


def test_what_is_not_public_is_not_guessed():
    with pytest.raises(
        LimbeckError, match="chip 910b: bf16 TFLOPS is not known here; give it as bf16=NUMBER"
    ):
        chips.find("910b").rate("bf16")
    assert chips.find("910b").change(bf16=313).rate("bf16") == 313e12
    with pytest.raises(LimbeckError, match="did you mean h800"):
        chips.find("h8000")
    with pytest.raises(LimbeckError, match="no figure of a chip; did you mean bf16"):
        chips.find("h800").change(bf15=3)


def test_dies_read_no_faster_than_the_link_between_them():
    wide, thin = chips.find("b200"), chips.find("b200").change(die_link=1000)
    assert wide.bandwidth == 8000e9 and thin.bandwidth == pytest.approx(2000e9)
    assert thin.rate("bf16") == wide.rate("bf16")


@pytest.mark.parametrize(
    ("text", "count", "chip", "nodes"),
    [
        ("2048xH800", 2048, "h800", 256),
        ("8x4090", 8, "4090", 1),
        ("h800-512", 512, "h800", 64),
        ("h100-64", 64, "h100", 8),
        ("fire-flyer-2", 10000, "a100-pcie", 1250),
        ("h20", 1, "h20", 1),
    ],
)
def test_grammar(text, count, chip, nodes):
    parsed = cluster.cluster(text)
    assert (parsed.count, parsed.chip.name, parsed.nodes) == (count, chip, nodes)


def test_what_if():
    assert cluster.cluster("2048xH800", nvlink=900).chip.link == 900e9
    assert cluster.cluster("2048xH800", chip="h20").chip.memory == 96e9
    assert cluster.cluster("2048xH800", nics=1).outside == 50e9
    assert cluster.cluster("fire-flyer-2").outside == 25e9


@pytest.mark.parametrize(
    ("text", "changes", "sentence"),
    [
        ("7yH800", {}, "is no cluster: write COUNTxCHIP"),
        ("8xfoo", {}, "chip 'foo' is not known"),
        ("0xh800", {}, "at least one chip"),
        ("8xh800", {"nvlink": "fast"}, "is no number"),
        ("8xh800", {"nic": -1}, "less than nothing"),
        ("8xh800", {"fabric": "string"}, "fabric 'string'"),
    ],
)
def test_mistakes(text, changes, sentence):
    with pytest.raises(LimbeckError, match=sentence):
        cluster.cluster(text, **changes)


def test_constants_are_few_and_say_where_they_come_from():
    entries = provenance()
    kinds = {"physics", "spec", "fitted", "guessed"}
    assert sum(entry["kind"] == "fitted" for entry in entries.values()) <= 12
    assert all(entry["kind"] in kinds and entry["what"] for entry in entries.values())
    assert all(entry.get("source") for entry in entries.values() if entry["kind"] == "spec")
    assert set(entries) >= set(constants().__dataclass_fields__)
