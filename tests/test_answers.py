"""What counts as the same answer, what is refused, and that nothing a model writes raises or hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.tasks import answers
from limbeck.tasks.answers import Verdict, extract, judge, parse_gold
from limbeck.tasks.sandbox import SANDBOX, Sandbox

SAME = [
    ("42", "42"), ("42", " 42. "), ("42", "$42$"), ("18", "$18"), ("18", "\\$18"), ("18", "18.00"),
    ("7", "007"), ("1234", "1,234"), ("1,234", "1234"), ("1234", "1{,}234"), ("-4", "−4"), ("12", "１２"),
    ("5", "x = 5"), ("x=5", "5"), ("3/4", "\\frac{3}{4}"), ("3/4", "0.75"), ("0.75", "3/4"),
    ("\\frac34", "6/8"), ("-\\frac{3}{4}", "-3/4"), ("-3/4", "\\frac{-3}{4}"), ("3/2", "1\\frac{1}{2}"),
    ("3/2", "1 1/2"), ("300000", "3 \\times 10^{5}"), ("75\\%", "75%"), ("18 cm", "18"),
    ("18 cm", "18\\text{ cm}"), ("18", "18 apples"), ("5", "5 元"), ("90^\\circ", "90"),
    ("90°", "90^{\\circ}"), ("Paris", "paris"), ("B", "(B)"), ("B", "\\text{B}"), ("(1,2)", "(1, 2)"),
    ("(-\\infty,3]", "\\left(-\\infty, 3\\right]"),
]  # fmt: skip
SAME_BY_MATHEMATICS = [
    ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}"), ("x^2+1", "1+x^2"), ("2\\pi", "\\pi\\cdot 2"),
    ("1, 2", "2, 1"), ("\\{1,2\\}", "\\{2,1\\}"), ("5x", "x\\cdot 5"), ("y=2x+1", "y=1+2x"),
]  # fmt: skip
DIFFERENT = [
    ("42", "41"), ("42", "41=42"), ("42", "1=2=42"), ("42", "x=41=42"), ("42", "41 or 42"),
    ("42", "42 or 41"), ("42", "41, 42"), ("42", "not 42"), ("75", "75\\%"), ("75\\%", "75"),
    ("0.75", "75%"), ("1/3", "0.333333333"), ("\\sqrt{2}", "1.41421356"), ("\\pi", "3.14159265358979"),
    ("\\infty", "\\infty+1"), ("1", "x/x"), ("x^2", "|x|^2"), ("A", "A, B, C, D"), ("A", "a"),
    ("A", "A or B"), ("\\{1,2\\}", "1"), ("[1,2]", "(1,2)"), ("(1,2)", "(2,1)"), ("1, 2", "2, 3"),
    ("136", "76+60"), ("2", "4/2"), ("5", "\\sqrt{25}"), ("1024", "2^{10}"), ("18 cm", "18 m"),
    ("5", "5 million"), ("5", "5 dozen"), ("5x", "5"), ("y=5", "x=5"), ("12", "1 2"), ("1", "1/0"),
    ("Paris", "Rome"), ("\\infty", "-\\infty"),
]  # fmt: skip
BOMBS = [
    "5^5^5^5^5", "5^{5^{5^{5}}}", "9!!!", "99999999!", "(" * 3000 + "1" + ")" * 3000, "\\frac{1}{" * 300,
    "9" * 200_000, "\\boxed{1}" * 20_000, "\\sum_{i=1}^{100000000} i", "x" * 513, "9**9**9**9",
    "(x+1)^{99999}", "1e999999999", "\x00", "\ud800", "{" * 500, "\\begin{pmatrix}" * 30,
    "1" + ",1" * 250, "٣", "½", "",
]  # fmt: skip


@pytest.mark.parametrize(("wanted", "answer"), SAME + SAME_BY_MATHEMATICS)
def test_same(wanted, answer):
    assert judge(wanted, answer) is Verdict.CORRECT


@pytest.mark.parametrize(("wanted", "answer"), DIFFERENT)
def test_different(wanted, answer):
    assert judge(wanted, answer) is Verdict.WRONG


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: bomb[:12].encode("unicode_escape").decode())
@pytest.mark.parametrize("wanted", ["42", "\\sqrt{2}"])
def test_bombs_are_refused_at_once(wanted, bomb):
    start = time.monotonic()
    assert judge(wanted, bomb) in (Verdict.WRONG, Verdict.UNPARSED)
    assert time.monotonic() - start < 60  # on the slowest machine; what is not refused takes hours


def test_numbers_need_no_child(monkeypatch):
    monkeypatch.setattr(SANDBOX, "ask", lambda *_, **__: pytest.fail("the child was asked"))
    for wanted, answer in SAME + [pair for pair in DIFFERENT if not set("{\\") & set(pair[0])]:
        if not any("," in text and "(" in text for text in (wanted, answer)) and (wanted, answer) != (
            "1, 2",
            "2, 3",
        ):
            judge(wanted, answer)


# ---------------------------------------------------------------- the child


HANGS = """
import time
from limbeck.tasks import sandbox_worker
sandbox_worker.JUDGES["busy"] = lambda: lambda answer: sum(iter(int, 1))
sandbox_worker.JUDGES["idle"] = lambda: lambda answer: [time.sleep(0.1) for _ in iter(int, 1)]
sandbox_worker.serve()
"""


@pytest.mark.parametrize("forever", ["busy", "idle"])
def test_a_judge_that_hangs_is_killed(forever):
    sandbox = Sandbox(HANGS)
    start = time.monotonic()
    assert sandbox.ask(forever, answer="4", deadline=0.3) == "timeout"
    assert time.monotonic() - start < 60  # the child's start, then either clock
    child = sandbox._child
    assert sandbox.ask("mathematics", "x+1", answer="1+x", deadline=5) == "correct"
    assert sandbox._child is child  # only the process that hung was ended
    sandbox.close()


def test_a_child_that_dies_is_an_error_and_replaced():
    sandbox = Sandbox()
    assert sandbox.ask("mathematics", "x+1", answer="1+x", deadline=5) == "correct"
    sandbox._child.send_signal(signal.SIGKILL)
    sandbox._child.wait()
    assert sandbox.ask("mathematics", "x+1", answer="1+x", deadline=5) == "error"
    assert sandbox.ask("mathematics", "x+1", answer="1+x", deadline=5) == "correct"
    sandbox.close()


def test_the_child_dies_with_its_parent():
    code = (
        "import os, signal\n"
        "from limbeck.tasks.sandbox import SANDBOX\n"
        "SANDBOX.ask('mathematics', 'x+1', answer='1+x', deadline=5)\n"
        "print(SANDBOX._child.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    child = int(done.stdout)
    for _ in range(50):
        if not _alive(child):
            return
        time.sleep(0.1)
    pytest.fail("the child outlived its parent")


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().split(") ")[1][0] != "Z"
    except OSError:
        return False


def test_threads_share_a_child():
    pairs, verdicts = [(f"x+{i}", f"{i}+x") for i in range(2, 10)], []
    threads = [threading.Thread(target=lambda p=p: verdicts.append(judge(*p))) for p in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == [Verdict.CORRECT] * len(pairs)


def test_a_pair_is_judged_once(monkeypatch):
    asked = []
    monkeypatch.setattr(SANDBOX, "ask", lambda *question, **_: asked.append(question) or "timeout")
    assert [judge("z+41", "41+z") for _ in range(3)] == [Verdict.TIMEOUT] * 3
    assert len(asked) == 1
    answers._verdicts.pop(("z+41", "41+z"))


def test_an_interrupted_question_leaves_no_reply_behind(monkeypatch):
    sandbox = Sandbox()
    with monkeypatch.context() as patch:
        patch.setattr("limbeck.tasks.sandbox._read_line", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sandbox.ask("mathematics", "x+1", answer="1+x", deadline=5)
    assert sandbox.ask("mathematics", "x+1", answer="2+x", deadline=5) == "wrong"
    sandbox.close()


def test_a_fork_starts_its_own_child():
    assert judge("w+1", "1+w") is Verdict.CORRECT
    if not (pid := os.fork()):
        os._exit(0 if judge("w+2", "2+w") is Verdict.CORRECT else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert judge("w+3", "3+w") is Verdict.CORRECT


# ---------------------------------------------------------------- extraction

THOUGHT = "<think>6 times 7</think>"


@pytest.mark.parametrize(
    ("text", "style", "answer"),
    [
        (THOUGHT + "<answer> 42 </answer>", "tags", "42"),
        ("6 times 7</think><answer>42</answer>", "tags", "42"),
        (THOUGHT + "It is \\boxed{42}.", "boxed", "42"),
        ("It is \\boxed{\\frac{1}{2}}", "boxed", "\\frac{1}{2}"),
        ("\\boxed{1} no</think>\\boxed {\\{1, 2\\}}", "boxed", "\\{1, 2\\}"),
        ("so 76 + 60 = 136", "final", "136"),
        ("first 5\n\nThe answer is $18.\n\n", "final", "18"),
        ("She has 1,234 apples.", "final", "1,234"),
        ("= -3/4", "final", "-3/4"),
        ("5 - 9 = -4", "final", "-4"),
        ("it is -4", "final", "-4"),
        ("it is $-4$.", "final", "-4"),
        ("**42**", "final", "42"),
        ("答案是４２。", "final", "42"),
        ("一共 12 个", "final", "12"),
        ("that makes 75%", "final", "75%"),
        ("2 and 2</think>4", "final", "4"),
    ],
)
def test_extract(text, style, answer):
    assert extract(text, style).answer == answer


@pytest.mark.parametrize(
    ("text", "style"),
    [
        ("<answer>42</answer>", "tags"),
        (THOUGHT + "42", "tags"),
        (THOUGHT + "<answer></answer>", "tags"),
        (THOUGHT + "<answer> </answer>", "tags"),
        (THOUGHT + "<answer>42</answer><answer>42</answer>", "tags"),
        (THOUGHT + "</answer>42<answer>", "tags"),
        (THOUGHT + THOUGHT + "<answer>42</answer>", "tags"),
        ("<think><answer>42</answer></think>", "tags"),
        (THOUGHT + "42", "boxed"),
        (THOUGHT + "\\boxed{}", "boxed"),
        (THOUGHT + "\\boxed{41}\\boxed{42}", "boxed"),
        (THOUGHT + "\\boxed{\\boxed{42}}", "boxed"),
        (THOUGHT + "\\boxed{42", "boxed"),
        (THOUGHT + "\\boxed 42", "boxed"),
        ("\\boxed{42}</think>", "boxed"),
        (THOUGHT + "\\boxed{" + "1" * 513 + "}", "boxed"),
        ("", "final"),
        ("no idea", "final"),
        ("42\nI am sure", "final"),
        ("76 + 60", "final"),
        ("9 -4", "final"),
        ("x - 4", "final"),
        ("(56 + -33) - 84", "final"),
        ("5 * 3", "final"),
        ("41 or 42", "final"),
        ("41 或者 42", "final"),
        ("41, 42", "final"),
        ("41,42", "final"),
    ],
)
def test_extract_refuses(text, style):
    found = extract(text, style)
    assert found.answer is None and found.reason


@pytest.mark.parametrize(
    ("raw", "answer"),
    [
        ("So 9 * 2 = 18.\n#### 18", "18"), ("#### 1,234", "1,234"),
        ("Thus $x = \\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}"), ("18", "18"), (" -3.5 ", "-3.5"),
        ("\\sqrt{2}", "\\sqrt{2}"), ("Paris", "Paris"), ("B", "B"), ("", None), ("####", None),
        ("\\boxed{1", None), ("\\frac{1}{2", None), ("1" * 600, None),
        ("We first note that the sum of all angles is known.", None), ("line one\nline two", None),
    ],
)  # fmt: skip
def test_gold(raw, answer):
    assert parse_gold(raw) == answer


# ---------------------------------------------------------------- whatever a model writes

NUMBERS = st.fractions(min_value=-(10**6), max_value=10**6, max_denominator=500)
PIECES = st.sampled_from(
    [
        "</think>",
        "<think>",
        "<answer>",
        "</answer>",
        "\\boxed{",
        "}",
        "{",
        "42",
        "-",
        "^",
        "!",
        "\\frac",
        "/",
        ",",
        ".",
    ]
    + [
        "=",
        "or",
        "(",
        ")",
        "|",
        "\\infty",
        "x",
        "%",
        "$",
        "\\text{",
        "或",
        "\n",
        " ",
        "9" * 50,
        "\\sqrt{",
        "°",
        "×",
    ]
)


def _spellings(value: Fraction) -> list[str]:
    n, d = value.numerator, value.denominator
    if d == 1:
        return [f"{n}", f"{n:,}", f"{n}.0", f" ${n}$ ", f"{n}.", f"x = {n}", f"{n} cm"]
    sign, n = "-" * (n < 0), abs(n)
    whole = f"{sign}{n // d} {n % d}/{d}" if n > d else f"{sign}{n}/{d}"
    return [f"{sign}{n}/{d}", f"{sign}\\frac{{{n}}}{{{d}}}", f"\\dfrac{{{sign}{3 * n}}}{{{3 * d}}}", whole]


@given(NUMBERS, st.data())
def test_a_rewriting_changes_no_verdict(value, data):
    wanted = data.draw(st.sampled_from(_spellings(value)[:2]))
    assert judge(wanted, data.draw(st.sampled_from(_spellings(value)))) is Verdict.CORRECT
    other = value + data.draw(NUMBERS.filter(bool))
    assert judge(wanted, data.draw(st.sampled_from(_spellings(other)))) is Verdict.WRONG


@given(
    st.integers(-999, 999),
    st.integers(-999, 999).filter(bool),
    st.sampled_from([" or ", "=", ", ", " and ", "+", "*"]),
)
def test_junk_earns_nothing(value, off, glue):
    for hedged in (f"{value}{glue}{value + off}", f"{value + off}{glue}{value}", f"{value}{glue}"):
        assert judge(f"{value}", hedged) is not Verdict.CORRECT or hedged.rstrip(".").strip() == f"{value}"


@settings(deadline=1000)
@given(
    st.lists(PIECES, max_size=60).map("".join) | st.text(max_size=600),
    st.sampled_from(["tags", "boxed", "final"]),
)
def test_any_text_is_extracted_and_judged(text, style):
    answer = extract(text, style).answer
    assert answer is None or 0 < len(answer) <= 512
    assert judge("42", answer or text) in Verdict
    assert parse_gold(text) is None or parse_gold(text).strip()


@settings(max_examples=40, deadline=None)
@given(st.lists(PIECES, max_size=8).map("".join))
def test_the_child_survives_any_text(text):
    assert judge("x^2", text, deadline=0.5) in Verdict
