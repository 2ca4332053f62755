"""What a model writes is never run, reaches nothing, and is not paid for being clever."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from limbeck.cli import doctor
from limbeck.config.recipe import Gym
from limbeck.tasks import confinement, generators, grammar
from limbeck.tasks.answers import Verdict, judge
from limbeck.tasks.grammar import ParseError
from limbeck.tasks.gym import GymTask
from limbeck.tasks.sandbox import SANDBOX, Sandbox
from limbeck.types import LimbeckError

pytest.importorskip("reasoning_gym")
from reasoning_gym.dataset import ProceduralDataset
from reasoning_gym.factory import DATASETS, create_dataset

SIZE = 2
EVALUATING = [  # whose scorers hand the answer to eval or to sympy's parser
    "binary_matrix", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication",
    "puzzle24",
    "simple_integration", "spiral_matrix", "string_insertion",
]  # fmt: skip


def gym(generator: str, **settings) -> GymTask:
    return GymTask(
        generator, Gym(source="gym", generator=generator, **{"size": SIZE, "held_out": 1, **settings})
    )


def scoring() -> list[str]:
    """The generators that have a scorer of their own."""
    return sorted(
        name
        for name, (kind, _) in DATASETS.items()
        if kind.score_answer is not ProceduralDataset.score_answer
    )


@pytest.fixture(scope="module")
def tasks() -> dict[str, GymTask]:
    """A small task of any generator, made when it is first asked for."""

    class Tasks(dict):
        def __missing__(self, generator: str) -> GymTask:
            return self.setdefault(generator, gym(generator))

    return Tasks()


def verdicts(task: GymTask, answer: str) -> set[Verdict]:
    """What is said of an answer to each of the task's problems."""
    return {task._compare(problem, answer) for problem in task.problems("train")}


# ---------------------------------------------------------------- attacks

CALL = r"""(exec)("open\x28'{file}','w'\x29")"""
CONNECT = r"""(exec)("import socket;socket.create_connection\x28('127.0.0.1',{port})\x29")"""
PATCH = (
    r"""(exec)("import reasoning_gym.dataset as d\nfor k in d.ProceduralDataset.__subclasses__\x28\x29:\n """
    r"""k.score_answer=lambda *a:1.0")"""
)
ATTACKS = [
    CALL, CONNECT, PATCH,
    "open('{file}','w')",
    "(open)('{file}','w')",
    "[open][0]('{file}','w')",
    "__import__('os').system('touch {file}')",
    "getattr(__builtins__,'op'+'en')('{file}','w')",
    "().__class__.__base__.__subclasses__()",
    "x.__class__.__mro__",
    "sin.__globals__",
    "f\"{{open('{file}','w')}}\"",
    "(x:=open('{file}','w'))",
    "(lambda: open('{file}','w'))()",
    "[open('{file}','w') for x in (1,)]",
    "1 if open('{file}','w') else 1",
    "1 and open('{file}','w')",
    "ｏｐｅｎ('{file}','w')",
    "ｅｘｅｃ('1')",
    "ѕin(x)",
    "\\u006fpen('{file}','w')",
    "'\\x6f\\x70\\x65\\x6e'",
    "eval('op'+'en')('{file}','w')",
    "S(\"open('{file}','w')\")",
    "sympify(\"open('{file}','w')\")",
    "parse_expr(\"open('{file}','w')\")",
    "Symbol('x').__class__",
    "Function('f')(x)",
    "lambdify(x,\"open('{file}','w')\")(1)",
    "Lambda(x,x)(1)",
    "sin(S(\"open('{file}','w')\"))",
    "x.subs(x,open('{file}','w'))",
    "Integral(x,x)",
    "1\nopen('{file}','w')",
    "1;open('{file}','w')",
    "1\r\nimport os",
    "1 #\n+open('{file}','w')",
    "import os; os.system('touch {file}')",
    "`touch {file}`",
    "$(touch {file})",
    "'; touch {file}; '",
    "{{\"__reduce__\": [\"os.system\", \"touch {file}\"]}}",
    "cos\nsystem\n(S'touch {file}'\ntR.",
    "!!python/object/apply:os.system ['touch {file}']",
    "@/etc/passwd", "file:///etc/passwd", "/etc/passwd", "~/.ssh/id_rsa", "http://127.0.0.1:{port}/",
    "type('E',(),{{'__eq__':lambda *a:True}})()",
    "9**9**9**9", "9**9**9**9**9*x", "((9**99)**99)**99", "x**(9**9**9)", "(x+1)**99**99",
    "((x+y+z+1)**99)**99",
    "exp(exp(exp(exp(9**99))))", "factorial(999999999)", "999999999!", "1e999999999", "[[0]]*10**9",
    "9" * 512, "1." + "0" * 500, "(" * 250 + "1" + ")" * 250, "[" * 500, "[" * 250 + "]" * 250,
    "{{\"a\":" * 80,
    "-" * 500 + "1", "+" * 511 + "1", "x**" * 160 + "x", "sin(" * 120 + "x" + ")" * 120, "a" * 511 + "!",
    " " * 510 + "x",
    "1,2" + ", " * 250, "((" * 60 + "A∧" * 60, "\x00", "1\x001", "\ud800", "\u202e1", "\x1b[2J", "correct",
    "correct\n", "started\ncorrect",
    "NaN", "nan", "-nan", "inf", "-Infinity", "1e999", "[NaN]", "[NaN, NaN, NaN]", "[[NaN]]", "nan+nanj",
    "A " * 250 + "!", "U' " * 160 + "!", "1 " * 250 + "!", "a, " * 160 + "!", "((x+y+C)**9+1)**9",
    "+".join(["(x+C)**10*(x+C)**9"] * 25), "x**((1/9)**99)**99", "((((1/9)**99)**99)**99)**99*x",
    "1/3**99+" * 60 + "x",
    "None", "...", "NotImplemented", "[]", "{{}}", "[[]]", "()", "''", "1==1", "not 0", "0x", "1_0", "1/0",
    "0/0", "%s%n", "*", "٣", "½",
    "{{\"a\": 1, \"a\": 2}}", "[true, true]", "[[true]]", "{{\"0\": true}}",
]  # fmt: skip


@pytest.fixture
def canary(tmp_path):
    """A file that must not appear and a door that nobody may knock at; gives a function that arms an
    attack."""
    file, door = tmp_path / "canary", socket.create_server(("127.0.0.1", 0))
    door.setblocking(False)
    yield (
        lambda attack: (
            attack.replace("{file}", str(file))
            .replace("{port}", str(door.getsockname()[1]))
            .replace("{{", "{")
            .replace("}}", "}")
        )
    )
    assert not file.exists()
    with pytest.raises(BlockingIOError):
        door.accept()
    door.close()


@pytest.mark.slow
@pytest.mark.parametrize("generator", EVALUATING)
def test_no_attack_runs_where_the_scorer_would_evaluate_it(tasks, canary, monkeypatch, generator):
    task = tasks[generator]
    for name in ("eval", "exec"):
        monkeypatch.setattr("builtins." + name, lambda *a, **k: pytest.fail("an answer was evaluated"))
    for attack in ATTACKS:
        start = time.monotonic()
        assert Verdict.CORRECT not in verdicts(task, canary(attack)), attack
        assert time.monotonic() - start < 60, attack


@pytest.mark.slow
def test_no_attack_is_paid_by_any_scorer(tasks, canary):
    # composite is refused; knight_swap is slow to generate, and its answers are read as those of jugs are
    for generator in set(scoring()) - {"composite", "knight_swap", *EVALUATING}:
        for attack in ATTACKS:
            assert Verdict.CORRECT not in verdicts(tasks[generator], canary(attack)), (generator, attack)


def test_what_one_answer_does_is_not_there_for_the_next(tasks, canary):
    for generator in EVALUATING:
        verdicts(tasks[generator], PATCH)
        assert not any(
            Verdict.CORRECT in verdicts(tasks[generator], answer)
            for answer in ("nonsense", "7", "x", "0 0", "A")
        )


@pytest.mark.parametrize("gold", ["\\sqrt{2}", "x+1", "(1, 2)", "\\frac{\\pi}{2}"])
def test_no_attack_runs_as_mathematics(canary, gold):
    for attack in ATTACKS[:52]:
        assert judge(gold, canary(attack)) is not Verdict.CORRECT, attack


# what the generators' own scorers paid in full, and what is no answer
@pytest.mark.parametrize(
    ("generator", "answer"),
    [
        ("game_of_life_halting", lambda e: "potato"),
        ("coin_flip", lambda e: "0"),
        ("complex_arithmetic", lambda e: "nan"),
        ("number_sorting", lambda e: json.dumps([float("nan")] * len(e["answer"].split(",")))),
        ("number_sorting",
         lambda e: str([float(n) + 0.4 for n in json.loads(e["answer"].replace("'", '"'))])),
        ("puzzle24", lambda e: "6*4*1*1"),
        ("puzzle24", lambda e: "9*5/2 + 2"),
        ("countdown",
         lambda e: f"{e['metadata']['target']} + 0*" + "*".join(map(str, e["metadata"]["numbers"]))),
        ("word_sorting", lambda e: e["answer"] + ", and more"),
        ("figlet_font", lambda e: e["answer"] + "s" * 20),
        ("letter_jumble", lambda e: e["answer"] + " and more"),
        ("spell_backward", lambda e: e["answer"] + "s"),
        ("game_of_life", lambda e: e["answer"][:-1] + ",[1,1,1]]"),
        ("game_of_life", lambda e: e["answer"].replace("0", "false").replace("1", "true")),
        ("simple_integration",
         lambda e: f"Integral({e['metadata']['integrand']}, {e['metadata']['variable']})"),
        ("intermediate_integration", lambda e: f"Integral({e['metadata']['integrand']}, x)"),
        ("polynomial_multiplication", lambda e: f"({e['answer']})*(1)"),
        ("polynomial_multiplication", lambda e: f"expand({e['answer']})"),
        ("polynomial_multiplication", lambda e: f"(-({e['answer']}))*(-(1))"),
        ("polynomial_equations", lambda e: "none"),
        ("polynomial_equations", lambda e: e["answer"] + ", nan"),
        ("knights_knaves", lambda e: f"{e['answer']} Zoe is a knight, and Zoe is a knave."),
        ("graph_color", lambda e: json.dumps({str(v): True for v in e["metadata"]["puzzle"]["vertices"]})),
    ],
)  # fmt: skip
def test_what_is_no_answer_is_not_paid(tasks, generator, answer):
    task = tasks[generator]
    for problem in task.problems("train"):
        trick = answer(task._entries[problem.id])
        assert task._compare(problem, trick) is not Verdict.CORRECT, trick


# ---------------------------------------------------------------- right answers


def gold(entry: dict) -> str | None:
    """A right answer to an entry: its own, or an example that it gives."""
    examples = ("example_correct_answer", "possible_answer", "example_answer")
    answer = entry["answer"] or next(
        (entry["metadata"][name] for name in examples if name in entry["metadata"]), None
    )
    return json.dumps(answer) if isinstance(answer, dict) else answer


@pytest.mark.parametrize("generator", sorted(set(DATASETS) - {"composite", "knight_swap"}))
def test_right_answers_earn_full_marks(tasks, generator):
    """Those that the generator's own scorer gives full marks, and that are worked out."""
    task, own, judged = tasks[generator], create_dataset(generator, seed=0, size=1), 0
    for problem in task.problems("train"):
        entry = task._entries[problem.id]
        answer = gold(entry)
        if answer is None or "Integral(" in answer or len(answer) > grammar.MAX_LENGTH:
            continue
        if own.score_answer(answer, entry) >= 1:
            judged += 1
            assert task._compare(problem, answer) is Verdict.CORRECT, answer
    assert judged or generator in ("boxnet", "rush_hour")  # these give no example


def test_a_right_answer_in_other_words_is_right(tasks):
    for generator, other in {
        "simple_integration": lambda a: f"({a}) + 7/3",
        "intermediate_integration": lambda a: f"({a}) + pi**2",
        "countdown": lambda a: f"(({a}))",
        "polynomial_multiplication": lambda a: f" + {a}" if a[0] != "-" else a.replace(" ", ""),
        "number_sorting": lambda a: a.replace("'", ""),
        "game_of_life": lambda a: a.replace(",", ", "),
        "complex_arithmetic": lambda a: a.replace(" ", "").replace("i", "j"),
        "sudoku": lambda a: a.replace(" ", "  "),
        "bitwise_arithmetic": lambda a: str(int(a, 16)),
    }.items():
        for problem in tasks[generator].problems("train"):
            if "Integral" not in problem.answer:
                assert tasks[generator]._compare(problem, other(problem.answer)) is Verdict.CORRECT


# ---------------------------------------------------------------- the grammar


@pytest.mark.parametrize(
    ("text", "amount"),
    [("1 + 2*3", 7), ("(1 + 2)*3", 9), ("-2**2", -4), ("2**3**2", 512), ("2**-1", 0.5), ("7/2 - .5", None),
     ("1.5*2", 3),
     ("--3", 3), ("2(3)", None), ("1 2", None), ("", None), ("1+", None), (")", None), ("2**100", None),
     ("x", None)],
)  # fmt: skip
def test_sums_are_read_as_python_would(text, amount):
    if amount is None:
        with pytest.raises(ParseError):
            grammar.evaluate(grammar.expression(text, powers=True))
    else:
        assert grammar.evaluate(grammar.expression(text, powers=True)) == amount


def test_polynomials_have_one_form():
    def read(text: str) -> grammar.Polynomial:
        return grammar.polynomial(grammar.expression(text, "xy", powers=True))

    assert read("(x+y)**2") == read("x**2 + 2*y*x + y**2") != read("x**2 + y**2")
    assert read("x**3/3 + x").derivative("x") == read("x*x + 1")
    for text in ("x**y", "x**-1", "1/x", "x**100", "(x+y)**99*(x-y)**99", "1/0", "z"):
        with pytest.raises(ParseError):
            read(text)


# ---------------------------------------------------------------- the sandbox, with the grammar left out

CODE = """
from limbeck.tasks import sandbox_worker
run = exec
def code():
    def judge(answer):
        names = {}
        run(answer, names)
        return "correct" if names.get("reached", True) else "wrong"
    return judge
sandbox_worker.JUDGES["code"] = code
sandbox_worker.serve()
"""
REACHES = {
    "write": "open({file!r}, 'w')",
    "read": "open('/etc/passwd').read()",
    "bait": "open({bait!r}).read()",
    "list": "import os; os.listdir('/')",
    "remove": "import os; os.remove({bait!r})",
    "rename": "import os; os.rename({bait!r}, {bait!r} + 'x')",
    "link": "import os; os.symlink('/etc', {file!r})",
    "folder": "import os; os.mkdir({file!r})",
    "stat": "import os; os.stat({bait!r})",
    "chdir": "import os; os.chdir('/')",
    "environ": "import os; open(f'/proc/{{os.getppid()}}/environ').read()",
    "own environ": "import os; reached = 'LIMBECK_BAIT' in os.environ or 'HOME' in os.environ",
    "memory": "open('/proc/self/mem', 'rb')",
    "connect": "import _socket; _socket.socket().connect(('127.0.0.1', {port}))",
    "datagram": "import _socket; _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)",
    "local socket": "import _socket; _socket.socket(_socket.AF_UNIX)",
    "pair": "import _socket; _socket.socketpair()",
    "fork": "import os; pid = os.fork(); pid or os._exit(0)",
    "program": "import os; os.execv('/bin/sh', ['sh', '-c', 'touch {file}'])",
    "shell": "import os; reached = os.system('touch {file}') == 0",
    "spawn": "import os; os.posix_spawn('/bin/sh', ['sh', '-c', 'touch {file}'], {{}})",
    "thread": "import _thread; _thread.start_new_thread(print, ())",
    "kill": "import os; os.kill(os.getpid() - 1, 0)",
    "kill all": "import os; os.kill(-1, 0)",
    "pipe": "import os; os.pipe()",
    "said": "import os; [os.write(n, b'correct\\n') for n in (0, 1, 2, 3, 4, 5)]",
    "clock": "import signal; signal.setitimer(signal.ITIMER_PROF, 0)",
    "deaf": "import signal; signal.signal(signal.SIGPROF, signal.SIG_IGN)",
    "limit": "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (9, 9))",
    "import": "import antigravity",
    "ctypes open": "import ctypes; reached = ctypes.CDLL(None).open(b'/etc/passwd', 0) >= 0",
    "io_uring": "import ctypes; reached = ctypes.CDLL(None).syscall(425, 8, bytes(200)) >= 0",
    "ptrace": "import ctypes; reached = ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0",
    "bpf": "import ctypes; reached = ctypes.CDLL(None).syscall(321, 0, bytes(200), 200) >= 0",
    "namespace": "import ctypes; reached = ctypes.CDLL(None).unshare(0x10000000) == 0",
    "memfd": "import ctypes; reached = ctypes.CDLL(None).memfd_create(b'x', 0) >= 0",
    "x32": "import ctypes; reached = ctypes.CDLL(None).syscall(0x40000000 + 2, b'/etc/passwd', 0) >= 0",
    "eval": "eval('1')",
    "compile": "compile('1', '', 'eval')",
    "exec": "exec('1')",
}


@pytest.fixture(scope="module")
def coding():
    os.environ["LIMBECK_BAIT"] = "1"
    sandbox = Sandbox(CODE)
    yield sandbox
    sandbox.close()
    del os.environ["LIMBECK_BAIT"]


def test_code_is_run_by_the_judge_of_this_test(coding):
    assert coding.ask("code", answer="reached = 1 + 1 == 2", deadline=2) == "correct"


def test_the_attempts_would_reach_where_nothing_was_taken_away(tmp_path):
    """Or the test below would prove nothing."""
    away = (
        "from limbeck.tasks import confinement, sandbox_worker\n"
        "confinement.confine = lambda: (0, False)\n"
        "sandbox_worker._disarm = lambda: None\n"
    )
    sandbox, door = Sandbox(away + CODE), socket.create_server(("127.0.0.1", 0))
    for reach in ("write", "read", "connect", "fork", "environ", "shell", "ctypes open", "clock", "eval"):
        code = REACHES[reach].format(file=str(tmp_path / "canary"), bait="", port=door.getsockname()[1])
        assert sandbox.ask("code", answer=code, deadline=2) == "correct", reach
    assert (tmp_path / "canary").exists()
    sandbox.close()
    door.close()


@pytest.mark.parametrize("reach", REACHES)
def test_code_reaches_nothing(coding, tmp_path, reach):
    file, bait, door = tmp_path / "canary", tmp_path / "bait", socket.create_server(("127.0.0.1", 0))
    bait.write_text("secret")
    door.setblocking(False)
    code = REACHES[reach].format(file=str(file), bait=str(bait), port=door.getsockname()[1])
    assert coding.ask("code", answer=code, deadline=2) in ("error", "wrong")
    assert not file.exists() and bait.read_text() == "secret"
    with pytest.raises(BlockingIOError):
        door.accept()
    door.close()


def test_code_leaves_nothing_behind(coding):
    patch = (
        "import sys\n"
        "v = sys.modules['limbeck.tasks.sandbox_worker']\n"
        "v._judge_in_fork = v._run_in_fork = lambda *a: 'correct'\n"
        "v.VERDICTS = ('correct',) * 4\nv.JUDGES.clear()\nreached = False"
    )
    assert coding.ask("code", answer=patch, deadline=2) in ("wrong", "error", "correct")
    for answer in ("reached = False", "1/0", "("):
        assert coding.ask("code", answer=answer, deadline=2) in ("wrong", "error")
    assert coding.ask("mathematics", "x+1", answer="x+2", deadline=2) == "wrong"


@pytest.mark.parametrize(
    "loop",
    ["while True: pass", "import time\nwhile True: time.sleep(1)", "x = [bytes(1 << 28) for _ in range(99)]"],
)
def test_code_that_hogs_is_ended(coding, loop):
    start = time.monotonic()
    assert coding.ask("code", answer=loop, deadline=0.2) in ("timeout", "error")
    assert time.monotonic() - start < 60
    assert coding.ask("code", answer="reached = True", deadline=2) == "correct"


# ---------------------------------------------------------------- what is proven, and what is refused


def test_what_holds_was_tried():
    proof = SANDBOX.proof()
    assert proof.holds and proof.seccomp
    finding = doctor._sandbox()
    assert finding.ok and "proven by trying: no file read, no file written, no connection" in finding.value


def test_what_does_not_hold_is_told():
    open_house = (
        "from limbeck.tasks import confinement, sandbox_worker; confinement.confine = lambda: (0, False); "
        "sandbox_worker.serve()"
    )
    sandbox = Sandbox(open_house)
    proof = sandbox.proof()
    assert not proof.holds and proof.refused == () and "neither Landlock nor seccomp" in str(proof)
    sandbox.close()


@pytest.mark.parametrize("layer", ["_landlock", "_seccomp"])
def test_each_layer_holds_what_it_can(layer):
    """Without one of them the other still keeps files and connections away."""
    off = (
        f"from limbeck.tasks import confinement, sandbox_worker; confinement.{layer} = lambda libc: 0; "
        "sandbox_worker.serve()"
    )
    sandbox = Sandbox(off)
    proof = sandbox.proof()
    if proof.landlock or proof.seccomp:
        assert {"file read", "file written", "program"} <= set(proof.refused)
    assert proof.holds == proof.seccomp
    sandbox.close()


def test_where_nothing_holds_only_what_needs_it_is_refused(monkeypatch):
    monkeypatch.setattr(SANDBOX, "proof", lambda: confinement.Proof(0, False, ()))
    for generator in ("rubiks_cube", "intermediate_integration"):
        with pytest.raises(
            LimbeckError, match=f"problems.{generator}.generator: {generator} is refused"
        ) as caught:
            gym(generator)
        assert "\n" not in str(caught.value)
    for generator in ("chain_sum", "countdown", "sudoku"):
        assert gym(generator).problems("train")


def test_what_nobody_read_is_refused_by_name(monkeypatch):
    with pytest.raises(LimbeckError, match="problems.composite.generator: composite is refused"):
        gym("composite", config={"datasets": []})
    monkeypatch.setattr(generators, "TEXT", generators.TEXT - {"ab"})
    with pytest.raises(LimbeckError, match="problems.ab.generator: ab is refused: its scorer was never read"):
        gym("ab")
    monkeypatch.setattr(generators, "AUDITED", "0.0.1")
    with pytest.raises(LimbeckError, match="pip install reasoning-gym==0.0.1"):
        gym("rubiks_cube")


def test_every_generator_is_judged_or_refused():
    audited = [
        *generators.TEXT,
        *generators.TEXT_IN_ANY_CASE,
        *generators.NUMBERS,
        *generators.FORMS,
        *generators.SCORED,
        *generators.SYMBOLIC,
        *generators.REFUSED,
    ]
    assert sorted(audited) == scoring()


def test_the_recipes_page_says_how_each_is_judged():
    page = (Path(__file__).parents[1] / "docs/reference/recipes.md").read_text(encoding="utf-8")
    rows = [
        set(row.split("|")[2].strip().split(", "))
        for row in page.splitlines()
        if row.startswith(("| compared", "| read", "| its form"))
    ]
    text = generators.TEXT | generators.TEXT_IN_ANY_CASE
    assert rows == [
        text,
        generators.NUMBERS,
        set(generators.FORMS),
        generators.SYMBOLIC,
        set(generators.SCORED),
    ]


def test_entries_cross_the_pipe_as_they_are():
    entry = {"a": (1, [2.5, None, {3: "x"}]), 4: True, "s": {1}, "t": ((), [], {})}
    assert generators.unpack(json.loads(json.dumps(generators.pack(entry)))) == entry


def test_threads_are_told_their_own_verdict(coding):
    said = {}
    threads = [
        threading.Thread(
            target=lambda i=i: said.update(
                {i: coding.ask("code", answer=f"reached = {i} % 2 == 0", deadline=2)}
            )
        )
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == {i: "wrong" if i % 2 else "correct" for i in range(8)}
