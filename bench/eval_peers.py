"""The verdicts of `limbeck eval --suite` beside those of lm-eval and lighteval, item by item.

    python -m bench.eval_peers                              # prompts and verdicts on thousands of responses
    python -m bench.eval_peers --suite gsm8k --peer lm-eval
    python -m bench.eval_peers --model models/smollm2-135m --rows test.jsonl --shots train.jsonl --items 50
    python -m bench.eval_peers --model models/smollm2-135m --suite math-500 --rows math-500.jsonl --items 50

Without a model, both sides are given the same rows and responses (bench/eval_cases.py), and prompts, verdicts
and, of ranked options, the choice are compared. With a model, GSM8K, MATH-500 or AIME is sampled greedily on
both sides by lm-eval's protocol, transformers against this package's engine. Peers run in environments of
their own (LIMBECK_BENCH_LM_EVAL and LIMBECK_BENCH_LIGHTEVAL name their interpreters), --model in this one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

from limbeck.config.parts import SuiteOptions
from limbeck.eval.suites.measure import SuiteTask, choose, cut_off, judge, open_suite

from .eval_cases import CASES
from .sides import HERE, python_of

# suite, protocol, lm-eval's file, its split of the items, the name of our file, further splits
LM_EVAL = (
    ("gsm8k", "lm-eval", "gsm8k/gsm8k.yaml", "test", "test.jsonl", {"train": "train.jsonl"}),
    ("math-500", "lm-eval", "minerva_math/minerva_math500.yaml", "test", "test.jsonl", {}),
    ("math-500", "lm-eval-hendrycks", "hendrycks_math/hendrycks_math500.yaml", "test", "test.jsonl", {}),
    ("aime-2024", "lm-eval", "aime/aime24.yaml", "train", "aime_2024.jsonl", {}),
    ("gpqa-diamond", "lm-eval", "gpqa/zeroshot/gpqa_diamond_zeroshot.yaml", "train",
     "gpqa_diamond.jsonl", {}),
    ("gpqa-diamond", "lm-eval-cot", "gpqa/cot_zeroshot/gpqa_diamond_cot_zeroshot.yaml", "train",
     "gpqa_diamond.jsonl", {}),
    ("mmlu-pro", "lm-eval", "mmlu_pro/mmlu_pro_math.yaml", "test", "test.jsonl",
     {"validation": "validation.jsonl"}),
    ("c-eval", "lm-eval", "ceval/ceval-valid_law.yaml", "val", "law_val.jsonl", {"dev": "law_dev.jsonl"}),
    ("ifeval", "lm-eval", "ifeval/ifeval.yaml", "train", "ifeval.jsonl", {}),
)  # fmt: skip
LIGHTEVAL = ("gsm8k", "math-500", "aime-2024", "gpqa-diamond", "mmlu-pro", "ifeval")
SHOWN = 6  # differences of one metric that are printed


def main() -> None:
    """Compare, print a table, and write every difference to a file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=list(CASES))
    parser.add_argument("--peer", choices=["lm-eval", "lighteval"])
    parser.add_argument("--every", type=int, default=1, help="take one of so many cases")
    parser.add_argument("--differences", type=Path, help="a JSONL file for every difference")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--shots", type=Path)
    parser.add_argument("--items", type=int, default=50)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    options = parser.parse_args()
    print("| suite | measured as | metric | responses | same prompts | same verdicts | right |")
    print("|---|---|---|---|---|---|---|", flush=True)
    found = sampled(options) if options.model else compared(options)
    if options.differences:
        lines = [json.dumps(row, ensure_ascii=False) for row in found]
        options.differences.write_text("\n".join(lines) + "\n", encoding="utf-8")


def compared(options: argparse.Namespace) -> list[dict]:
    """Both peers on given responses; returns the differences."""
    found = []
    for suite, protocol, yaml, split, name, more in LM_EVAL:
        if options.suite in (None, suite) and options.peer in (None, "lm-eval"):
            with tempfile.TemporaryDirectory() as folder:
                rows, responses = zip(*list(CASES[suite]())[:: options.every], strict=True)
                files = write_files(Path(folder), suite, rows, {split: name, **more})
                task = open_suite(suite, SuiteOptions(data=folder, protocol=protocol))
                case = {"yaml": yaml, "files": files, "responses": [cut(task, text) for text in responses]}
                found += tell(task, responses, ask("lm_eval", case))
    for suite in LIGHTEVAL:
        if options.suite in (None, suite) and options.peer in (None, "lighteval"):
            with tempfile.TemporaryDirectory() as folder:
                rows, responses = zip(*list(CASES[suite]())[:: options.every], strict=True)
                name = {"aime-2024": "aime_2024", "gpqa-diamond": "gpqa_diamond", "ifeval": "ifeval"}
                write_files(Path(folder), suite, rows, {"": f"{name.get(suite, 'test')}.jsonl"})
                task = open_suite(suite, SuiteOptions(data=folder, protocol="lighteval"))
                golds = [item.gold for item in task.items]
                case = {"suite": suite, "rows": rows, "golds": golds, "responses": responses}
                found += tell(task, responses, ask("lighteval", case))
    return found


def write_files(folder: Path, suite: str, rows: tuple[dict, ...], names: dict[str, str]) -> dict[str, str]:
    """The rows, and as further splits the different ones among them, in a folder; returns the paths."""
    different = list({json.dumps(row, sort_keys=True): row for row in rows}.values())
    files = {}
    for number, (split, name) in enumerate(names.items()):
        path = folder / suite / name
        path.parent.mkdir(exist_ok=True)
        lines = [
            json.dumps(_both_cases(suite, row), ensure_ascii=False) for row in (different if number else rows)
        ]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        files[split] = str(path)
    return files


def _both_cases(suite: str, row: dict) -> dict:
    """The row; AIME's columns have capital letters in the copy that lm-eval reads."""
    return row | {key.title(): value for key, value in row.items()} if suite == "aime-2024" else row


def cut(task: SuiteTask, text: str) -> str:
    """A response before the protocol's stop texts."""
    return cut_off(text, task.sampling.stop) if task.sampling else text


def ask(peer: str, case: dict[str, Any], python: str = "") -> list[dict]:
    """The peer's prompts and verdicts, row by row."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "case.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(case), encoding="utf-8")
        script = HERE / "workers" / f"{peer}_verdicts.py"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        run = subprocess.run(
            [python or python_of(peer), str(script), str(asked), str(answer)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if not answer.exists():
            raise SystemExit(f"{peer} ended:\n{run.stderr[-3000:]}")
        return json.loads(answer.read_text(encoding="utf-8"))["rows"]


def tell(task: SuiteTask, responses: tuple[str, ...], theirs: list[dict]) -> list[dict]:
    """Print a line for each metric; returns the differences."""
    verdicts = [verdict(task, i, text, theirs[i]) for i, text in enumerate(responses)]
    prompts = sum(mine == their["prompt"] for mine, their in zip(task.prompts, theirs, strict=True))
    found = []
    for name in verdicts[0]:
        right, different = 0.0, 0
        for i, text in enumerate(responses):
            mine = verdicts[i][name]
            their = theirs[i]["verdicts"].get(name, theirs[i]["verdicts"].get("verdict"))
            right += sum(mine) / len(mine)
            if list(map(bool, mine)) != list(map(bool, their)):
                different += 1
                about = {"suite": task.suite.name, "as": task.protocol.name, "metric": name}
                gold = task.items[i].gold or task.items[i].row.get("kwargs")
                found.append({**about, "gold": gold, "response": text, "ours": mine, "theirs": their})
        count = len(responses)
        print(
            f"| {task.suite.name} | {task.protocol.name} | {name} | {count} | {prompts / count:.1%} | "
            f"{1 - different / count:.2%} ({different}) | {right / count:.1%} |",
            flush=True,
        )
        for row in found[len(found) - different :][:SHOWN]:
            print(
                f"  gold {row['gold']!r}, ours {row['ours']}, theirs {row['theirs']}: {row['response']!r}",
                file=sys.stderr,
            )
    return found


def verdict(task: SuiteTask, i: int, text: str, theirs: dict) -> dict[str, list[bool]]:
    """Our verdicts on a response, or on made-up log-likelihoods of the options."""
    item = task.items[i]
    if task.sampling is None:
        options = task.protocol.options or tuple(item.letters)
        texts = [task.prompts[i] + f" {option}" for option in options]
        scores = [-float(zlib.crc32(one.encode()) % 9973) for one in texts]
        return {name: [value] for name, value in choose(item, options, scores).items()}
    return {name: rows[0] for name, rows in judge(task.protocol.metrics, item, [cut(task, text)]).items()}


def sampled(options: argparse.Namespace) -> list[dict]:
    """A suite with a model on both sides, greedily; returns the differences."""
    with tempfile.TemporaryDirectory() as folder:
        task, case = asked_of_model(options, folder)
        start = time.perf_counter()
        theirs = ask("lm_eval", case, sys.executable)
        print(f"lm-eval: {time.perf_counter() - start:.0f} s", file=sys.stderr)
        start = time.perf_counter()
        rows = ours(options.model, task)
        print(f"limbeck: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    same = sum(mine["response"] == their["response"] for mine, their in zip(rows, theirs, strict=True))
    prompts = sum(mine == their["prompt"] for mine, their in zip(task.prompts, theirs, strict=True))
    print(f"{same} of {len(rows)} responses are the same text", file=sys.stderr)
    found = []
    for name in rows[0]["verdicts"]:
        pairs = [
            (row["verdicts"][name][0], their["verdicts"][name])
            for row, their in zip(rows, theirs, strict=True)
        ]
        different = [i for i, (mine, their) in enumerate(pairs) if mine != their]
        right = sum(mine[0] for mine, _ in pairs) / len(pairs)
        print(
            f"| {task.suite.name} | {task.protocol.name} | {name} | {len(rows)} | "
            f"{prompts / len(rows):.1%} | "
            f"{1 - len(different) / len(rows):.2%} ({len(different)}) | {right:.1%} |"
        )
        found += [
            {"metric": name, "ours": rows[i]["response"], "theirs": theirs[i]["response"]} for i in different
        ]
    return found


def asked_of_model(options: argparse.Namespace, folder: str) -> tuple[SuiteTask, dict[str, Any]]:
    """The suite that a model is asked on both sides: ours, and lm-eval's case, with the user's rows in files
    in the folder."""
    suite, protocol, yaml, split, name, more = next(
        row for row in LM_EVAL if row[0] == (options.suite or "gsm8k")
    )
    given = {split: (name, options.rows)} | {other: (more[other], options.shots) for other in more}
    files = {}
    for place, (file, path) in given.items():
        if path is None:
            raise SystemExit(f"--rows and --shots: {suite} needs a file of {place}")
        rows = [_both_cases(suite, json.loads(line)) for line in path.read_text("utf-8").splitlines()]
        files[place] = f"{folder}/{file}"
        Path(files[place]).write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    settings = {"protocol": protocol, "items": options.items, "max_new_tokens": options.max_new_tokens}
    task = open_suite(suite, SuiteOptions(data=folder, **settings))
    if task.sampling is None:
        raise SystemExit(f"--suite {suite}: its options are ranked; --model compares sampled responses")
    limits = {"limit": options.items, "gen_kwargs": f"max_gen_toks={options.max_new_tokens}"}
    return task, {"yaml": yaml, "files": files, "model": str(options.model), **limits}


def ours(model: Path, task: SuiteTask) -> list[dict]:
    """The model's verdicts here."""
    import torch

    from limbeck.engine.rollout import Engine
    from limbeck.eval.suites.measure import engines_for, measure
    from limbeck.model import weights
    from limbeck.text.tokenizer import Tokenizer

    decoder = weights.load(model, torch.float32)
    engine = Engine(decoder, Tokenizer.from_directory(model), 16)
    return measure(task, slice(None), engines_for([task], engine)[task.suite.name], 0)


if __name__ == "__main__":
    main()
