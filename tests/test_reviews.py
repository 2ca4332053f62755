"""The human queue: whose verdict stands, what two people do to a row, and what a stage makes of it."""

from __future__ import annotations

import json

import pytest

from limbeck.eval.statistics import krippendorff
from limbeck.pipeline.review import curate, edits, review_queue
from limbeck.pipeline.review.agreement import agreement, paces
from limbeck.types import LimbeckError


def row(name: str) -> dict:
    text = f"<think> {name} </think> <answer> 1 </answer>"
    return {
        "id": name,
        "prompt": "?",
        "language": "en",
        "completion": text,
        "tokens": [1],
        "origin": {"problem": "x"},
    }


ROWS = [row(name) for name in "abcdef"]


@pytest.fixture
def queue(tmp_path):
    curate.write_queue(tmp_path, lambda: ROWS, "good?")
    return tmp_path


def say(queue, name, verdict, reviewer, **more):
    review_queue.review(queue, {"id": name, "verdict": verdict, "reviewer": reviewer, **more})


def states(queue) -> str:
    return " ".join(one.state for one in review_queue.review_states(queue))


def test_one_person_is_enough_unless_two_are_asked_for(queue):
    say(queue, "a", "accept", "Ada")
    assert states(queue) == "settled open open open open open"
    review_queue.set_second_share(queue, 1.0, "Ada")
    assert states(queue) == "second open open open open open"
    first = review_queue.review_states(queue)[0]
    assert not first.due("Ada")
    assert first.due("Grace")
    say(queue, "a", "accept", "Grace")
    assert review_queue.review_states(queue)[0].people == ["Ada", "Grace"]
    review_queue.set_second_share(queue, 0.0, "Ada")
    say(queue, "b", "reject", "Grace", reason="wrong")
    assert states(queue) == "settled settled open open open open"
    with pytest.raises(LimbeckError, match="no share"):
        review_queue.set_second_share(queue, 1.5, "Ada")


def test_a_larger_share_holds_a_smaller_one_and_is_as_large_as_it_says():
    names = [f"clock/{i}#0" for i in range(4000)]
    few, many = ({name for name in names if review_queue.needs_second(name, share)} for share in (0.2, 0.5))
    assert few < many
    assert abs(len(few) - 800) < 100
    assert abs(len(many) - 2000) < 130
    assert not any(review_queue.needs_second(name, 0.0) for name in names)
    assert all(review_queue.needs_second(name, 1.0) for name in names)


def test_people_who_disagree_leave_a_row_open_until_somebody_settles_it(queue):
    mended = "<think> mended </think> <answer> 1 </answer>"
    say(queue, "a", "accept", "Ada")
    say(queue, "a", "edit", "Grace", completion=mended)
    assert states(queue).startswith("disputed")
    assert review_queue.pending(queue)[0]["id"] == "a"
    assert not review_queue.review_states(queue)[0].due("Mary")
    say(queue, "a", "edit", "Mary", completion=mended, resolves=True)
    settled = review_queue.review_states(queue)[0]
    assert settled.state == "settled"
    assert settled.people == ["Mary"]
    assert settled.verdict["completion"] == mended
    say(queue, "a", "reject", "Ada")  # a later word unsettles nothing
    assert review_queue.review_states(queue)[0].people == ["Mary"]
    review_queue.undo(queue, "a", "Ada")
    review_queue.undo(queue, "a", "Mary")
    assert review_queue.review_states(queue)[0].state == "settled"
    assert review_queue.review_states(queue)[0].people == ["Grace"]


def test_the_same_text_is_no_disagreement_whatever_it_is_called(queue):
    say(queue, "a", "accept", "Ada")
    say(queue, "a", "edit", "Grace", completion="<think>  a </think>\n<answer> 1 </answer> ")
    say(queue, "b", "edit", "Ada", completion="x  y")
    say(queue, "b", "edit", "Grace", completion="x y")
    say(queue, "c", "reject", "Ada", reason="wrong")
    say(queue, "c", "reject", "Grace", reason="unreadable")
    assert states(queue) == "settled settled settled open open open"


def test_the_last_word_of_a_person_counts_and_can_be_taken_back(queue):
    say(queue, "a", "accept", "Ada")
    say(queue, "a", "reject", "Ada")
    assert review_queue.review_states(queue)[0].verdict["verdict"] == "reject"
    review_queue.undo(queue, "a", "Grace")
    assert review_queue.review_states(queue)[0].state == "settled"
    review_queue.undo(queue, "a", "Ada")
    assert review_queue.review_states(queue)[0].state == "open"
    assert review_queue.review_states(queue)[0].due("Ada")
    with pytest.raises(LimbeckError, match="no such row"):
        review_queue.undo(queue, "z", "Ada")


def test_rows_come_out_as_people_left_them(queue):
    mended = "<think> mended </think> <answer> 1 </answer>"
    for name, verdict in zip("abcde", ("accept", "reject", "accept", "accept", "edit"), strict=True):
        say(queue, name, verdict, "Ada", **({"completion": mended} if verdict == "edit" else {}))
    with pytest.raises(curate.Waiting, match="1 rows"):
        curate.apply_reviews(ROWS, queue)
    say(queue, "f", "accept", "Ada")
    say(queue, "c", "reject", "Grace")
    with pytest.raises(curate.Waiting):
        curate.apply_reviews(ROWS, queue)
    say(queue, "c", "accept", "Mary", resolves=True)
    say(queue, "a", "accept", "Grace")
    kept, notes = curate.apply_reviews(ROWS, queue)
    assert [(one["id"], one["origin"]["editor"]) for one in kept] == [
        ("a", "Ada, Grace"),
        ("c", "Mary"),
        ("d", "Ada"),
        ("e", "Ada"),
        ("f", "Ada"),
    ]
    assert kept[3]["completion"] == mended
    assert kept[3]["reasoning_content"] == "mended"
    assert "tokens" not in kept[3]
    assert kept[0]["tokens"] == [1]
    told = {key: notes[key] for key in ("policy", "reviewers", "accepted", "edited", "rejected", "resolved")}
    assert told == {
        "policy": "people",
        "reviewers": ["Ada", "Grace", "Mary"],
        "accepted": 4,
        "edited": 1,
        "rejected": 1,
        "resolved": 1,
    }
    assert (notes["agreement"]["rows"], notes["agreement"]["same"]) == (2, 0.5)


def test_what_is_said_while_a_stage_runs_does_not_reach_into_it(queue):
    for name in "abcdef":
        say(queue, name, "accept", "Ada")
    said = review_queue.extent(queue)
    before = review_queue.digest(queue, said)
    say(queue, "a", "reject", "Ada")
    (queue / review_queue.REVIEWS).open("a").write(
        '{"id": "b", "verd'
    )  # and somebody is killed in the middle of a word
    assert len(curate.apply_reviews(ROWS, queue, said)[0]) == 6
    assert len(curate.apply_reviews(ROWS, queue)[0]) == 5
    assert (
        review_queue.digest(queue, said) == before != review_queue.digest(queue, review_queue.extent(queue))
    )
    say(queue, "b", "reject", "Ada")
    assert len(curate.apply_reviews(ROWS, queue)[0]) == 4


def test_a_recipe_says_once_how_many_rows_two_people_see(queue):
    def ask(second):
        curate.write_queue(queue, lambda: pytest.fail("the rows lie there already"), "good?", second)
        return review_queue.second_share(queue)

    assert [ask(None), ask(0.5), ask(0.5)] == [0.0, 0.5, 0.5]
    assert len(review_queue.events(queue)) == 1
    review_queue.set_second_share(queue, 1.0, "Ada")
    assert [ask(0.5), ask(0.2), ask(None)] == [1.0, 0.2, 0.2]


def test_rows_go_out_blind_and_disagreements_with_what_was_said(queue, tmp_path):
    review_queue.set_second_share(queue, 1.0, "Ada")
    say(queue, "a", "reject", "Ada", reason="secret reason")
    say(queue, "b", "accept", "Ada")
    say(queue, "b", "reject", "Grace", reason="open reason")
    blind, *_, disputed = review_queue.export_rows(queue, "Grace")
    assert blind["id"] == "a"
    assert "secret" not in json.dumps(blind)
    assert disputed["id"] == "b"
    assert disputed["resolves"]
    assert [said["reviewer"] for said in disputed["verdicts"]] == ["Ada", "Grace"]
    sheet = tmp_path / "sheet.jsonl"
    sheet.write_text("".join(json.dumps({**one, "verdict": "reject"}) + "\n" for one in (blind, disputed)))
    assert review_queue.import_reviews(queue, sheet, "Grace") == 2
    assert states(queue) == "settled settled open open open open"


def test_pace_and_agreement(queue):
    for name, ada, grace in (("a", "accept", "accept"), ("b", "accept", "reject"), ("c", "reject", "reject")):
        say(queue, name, ada, "Ada", seconds=10.0 if name != "c" else 40.0)
        say(queue, name, grace, "Grace")
    say(queue, "d", "accept", "Ada", seconds=20.0)
    say(queue, "b", "accept", "Grace", resolves=True)  # comes after the disagreement, and is no vote
    ada, grace = paces(review_queue.review_states(queue))
    assert (ada.reviewer, ada.rows, ada.seconds, ada.hourly, ada.timed) == ("Ada", 4, 15.0, 3600 * 4 / 80, 4)
    assert (grace.rows, grace.counts["reject"], grace.seconds, grace.hourly) == (3, 2, None, None)
    told = agreement(review_queue.review_states(queue))["agreement"]
    assert (told["rows"], told["people"], round(told["same"], 3), round(told["alpha"], 3)) == (
        3,
        2,
        0.667,
        0.444,
    )
    assert told["low"] < 2 / 3 < told["high"]
    assert agreement([]) == {}


def test_alpha_is_that_of_the_literature():
    """The two examples of Krippendorff 2011: two observers of ten units with two values (section A), and four
    observers of twelve with five values and gaps (section C)."""
    two = ["0100000010", "1110010000"]
    four = ["123321412***", "1233224125*3", "*3332342251*", "12332441251*"]
    for observers, alpha in ((two, 0.095), (four, 0.743)):
        units = [[value for value in column if value != "*"] for column in zip(*observers, strict=True)]
        assert krippendorff(units) == pytest.approx(alpha, abs=5e-4)
    assert krippendorff([["a", "a"], ["a"]]) is None
    assert krippendorff([]) is None


# ---------------------------------------------------------------- texts

TEXTS = [
    "",
    " ",
    "try 5 +1 gives 6",
    "先算 3，再算 4。",
    "<think> 等 no </think>\n\n<answer> 2 </answer>",
    "a < b <c and\r\n\td",
    "x\ny\n\nz",
]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_whole_text(text):
    assert "".join(edits.pieces(text)) == text
    assert (
        "".join(passage for passage, _ in edits.marked(text, "en"))
        == text
        == "".join(passage for passage, _ in edits.marked(text, "zh"))
    )


def test_parts_are_whole_sentences_and_the_whole_text():
    text = "one two three.\n" * 20 + "x" * 90
    assert "".join(edits.parts(text, 40)) == text
    assert all(len(part) <= 40 or part == "x" * 90 for part in edits.parts(text, 40))
    assert list(edits.parts("")) == [""]


@pytest.mark.parametrize("before", TEXTS)
@pytest.mark.parametrize("after", TEXTS)
def test_a_difference_holds_both_texts_whole(before, after):
    found = edits.difference(before, after)
    assert "".join(old for _, old, _ in found) == before
    assert "".join(new for *_, new in found) == after
    assert all(old == new for kind, old, new in found if kind == "same")


def test_a_difference_is_small_where_little_changed():
    assert edits.difference("try 5 no 等 6", "try 5 错 等 6") == [
        ("same", "try 5 ", "try 5 "),
        ("changed", "no ", "错 "),
        ("same", "等 6", "等 6"),
    ]
    long = " ".join(f"then {i} comes." for i in range(20_000))
    found = edits.difference(long, long.replace("then 5 ", "Then 5 ").replace("17000", "seventeen"))
    assert [one for one in found if one[0] == "changed"] == [
        ("changed", "then ", "Then "),
        ("changed", "17000 ", "seventeen "),
    ]


def test_trimming_takes_circles_and_endings_and_nothing_else():
    loop = "wait 2 +5 gives 0 =5 gives 2 no "
    assert (
        edits.trimmed(f"<think> try 1 {loop * 40}so 3 </think> <answer> 3 </answer> hope")
        == f"<think> try 1 {loop}so 3 </think> <answer> 3 </answer>"
    )
    assert edits.trimmed("先算三加四等于七，" * 30 + "完") == "先算三加四等于七，完"
    plain = "<think> try 2 +5 gives 0 no no wait 2 -5 gives 4 </think> <answer> 2 -5 </answer>"
    assert edits.trimmed(plain) == plain


def test_words_of_another_language_are_found():
    def strange(text, language):
        return [passage for passage, kind in edits.marked(text, language) if kind == "strange"]

    assert strange("try 5 先算 a 等 <answer>", "en") == ["先算", "等"]
    assert strange("先算 x 和 \\frac12 and then, 7 don't <think>", "zh") == ["and then", "don't"]


# ---------------------------------------------------------------- at a terminal


def test_disagreements_are_settled_at_the_terminal(queue, monkeypatch, capsys):
    from limbeck.cli import review

    say(queue, "a", "reject", "Ada", reason="dull")
    say(queue, "a", "accept", "Grace")
    for name in "cdef":
        say(queue, name, "accept", "Mary")
    answers = iter(["a", "r", "indeed"])
    monkeypatch.setattr(review.sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers))
    review.review_at_terminal(queue, "Mary")
    told = capsys.readouterr().out
    assert "[1/2]" in told
    assert "[2/2]" in told
    assert "Ada says reject: dull" in told
    assert "Grace says accept: as it is" in told
    assert told.endswith("all rows are reviewed: run the recipe again and it goes on\n")
    assert [(one.verdict["verdict"], one.people) for one in review_queue.review_states(queue)[:2]] == [
        ("reject", ["Mary"]),
        ("accept", ["Mary"]),
    ]
