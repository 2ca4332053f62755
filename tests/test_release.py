"""A released directory: others load it, its sums hold, its recipe makes it again, and what may not leave does
not."""

from __future__ import annotations

import hashlib
import json
import re
import shutil

import pytest
import torch
import yaml
from tiny import answer

from limbeck.config.load import dump, load
from limbeck.model import weights
from limbeck.model.kv_cache import Packed
from limbeck.pipeline.graph import Graph
from limbeck.pipeline.model_name import find_artifact
from limbeck.pipeline.provenance.lineage import find
from limbeck.pipeline.provenance.release import part_of, release
from limbeck.pipeline.store import Store
from limbeck.text.tokenizer import Tokenizer
from limbeck.types import LimbeckError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def out(finished, tmp_path_factory):
    """The tiny recipe's `zero`, which was evaluated, as others get it."""
    folder = tmp_path_factory.mktemp("release") / "tiny-zero"
    notes = release("tiny/zero", folder, finished.home).notes
    assert any("no GGUF file: tokenizer.json: model.type = WordLevel" in note for note in notes)
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished runs whose `dev1` can be given another origin."""
    home = shutil.copytree(finished.home, tmp_path / "runs")

    def bind(*licences: str, **news):
        artifact, store = find_artifact("tiny/dev1", home)
        store.amend(artifact, {"licences": list(licences), **news})
        return home

    return bind


def test_transformers_loads_it_and_computes_the_same(out, finished):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    made = transformers.AutoTokenizer.from_pretrained(out)
    ours = weights.load(out)
    tokenizer = Tokenizer.from_directory(out)
    ids = tokenizer.prompt("use 1 2 1 make 0 ?")
    asked = made.apply_chat_template(
        [{"role": "user", "content": "use 1 2 1 make 0 ?"}], add_generation_prompt=True, return_dict=False
    )
    assert list(asked) == ids.tolist()
    assert theirs.generation_config.eos_token_id == tokenizer.end_id
    with torch.no_grad():
        expected = theirs(torch.tensor([ids.tolist()])).logits[0]
        found = ours.head(ours(torch.tensor(ids), Packed([len(ids)])))
    assert torch.allclose(found, expected, atol=1e-5)
    source = find_artifact("tiny/zero", finished.home)[0].folder / "model" / "model.safetensors"
    assert (out / "model.safetensors").read_bytes() == source.read_bytes()


def test_the_sums_hold_and_name_every_file(out):
    lines = dict(reversed(line.split("  ")) for line in (out / "SHA256SUMS").read_text().splitlines())
    assert set(lines) == {p.name for p in out.iterdir()} - {"SHA256SUMS"}
    assert set(lines) >= {
        "README.md",
        "lineage.json",
        "recipe.yaml",
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
    }
    assert all(
        hashlib.sha256((out / name).read_bytes()).hexdigest() == digest for name, digest in lines.items()
    )


def test_its_recipe_is_the_part_that_it_depends_on_and_plans_to_the_same_keys(out, finished):
    recipe = load(out / "recipe.yaml")
    assert set(recipe.stages) == {"base", "zero", "evaluation"}
    assert set(recipe.problems) == {"clock"}
    nodes = Graph(recipe, Store(finished.home / "store"), out).nodes
    assert set(nodes) == {"base", "zero", "evaluation/zero"}
    assert all(node.artifact for node in nodes.values())
    assert nodes["zero"].key == find("tiny/zero", finished.home).root


def test_a_recipe_with_a_desk_and_one_with_a_model_brought_in_plan_to_the_same_keys_too(finished, tmp_path):
    whole = load(finished.home / "tiny" / "recipe.yaml")
    store = Store(finished.home / "store")
    for name, stages in (
        ("dev1", {"base", "traces", "coldstart", "general", "dev1", "evaluation"}),
        ("brought", {"brought", "evaluation"}),
    ):
        part = part_of(whole, name)
        assert set(part.stages) == stages
        assert part.stages["evaluation"].models == [name]
        (tmp_path / "recipe.yaml").write_text(dump(part))
        assert str(finished.home.parent) not in dump(part)
        shutil.copytree(finished.recipe.parent / "model", tmp_path / "model", dirs_exist_ok=True)
        node = Graph(load(tmp_path / "recipe.yaml"), store, tmp_path).nodes[name]
        assert node.artifact.folder == find_artifact(f"tiny/{name}", finished.home)[0].folder


def test_the_card_tells_what_the_runs_have_shown(out, finished):
    text = (out / "README.md").read_text()
    front, body = re.fullmatch(r"---\n(.*?)---\n(.*)", text, re.DOTALL).groups()
    front = yaml.safe_load(front)
    told = json.loads(
        (find_artifact("tiny/evaluation/zero", finished.home)[0].folder / "evaluation.json").read_text()
    )
    accuracy = told["sources"]["clock"]["modes"]["t1"]["accuracy"]
    values = front["model-index"][0]["results"][0]["metrics"]
    assert {
        "type": "accuracy",
        "name": "accuracy, temperature 1",
        "value": round(100 * accuracy["mean"], 1),
    } in values
    assert "license" not in front
    assert front["pipeline_tag"] == "text-generation"
    row = (
        f"| clock | temperature 1 | {100 * accuracy['mean']:.1f} % | {100 * accuracy['low']:.1f} – "
        f"{100 * accuracy['high']:.1f} % | {accuracy['problems']} | {accuracy['n']} |"
    )
    assert row in body
    assert "Bound by no licence." in body
    assert "Energy: not measured." in body
    zero = find("tiny/zero", finished.home)
    total = sum(entry["flops"] for entry in zero.entries.values())
    assert f"| all | | {sum(e['tokens'] for e in zero.entries.values()):,} | {total:.2g} |" in body
    assert "measured on clock and on nothing else" in body
    assert "were compared with the test" in body


def test_why_reads_a_released_directory(call, out):
    lines = call("why", out).out.splitlines()
    assert lines[0].startswith("zero (rl-")
    assert any("base (pretrain-" in line for line in lines)
    assert "they stay in the store" in call("why", out, "--rows").err


def test_nothing_of_the_house_goes_along(copy, tmp_path):
    home = copy(
        sources={
            "problems": [],
            "models": [],
            "teachers": [],
            "editors": ["Ada Lovelace", "policy: translate"],
        }
    )
    store = Store(home / "store")
    desk = find_artifact("tiny/coldstart", home)[0]
    store.amend(
        desk,
        {
            "notes": {**desk.manifest["notes"], "reviewers": ["Ada Lovelace"]},
            "sources": {**desk.manifest["sources"], "editors": ["Ada Lovelace"]},
        },
    )
    release("tiny/dev1", tmp_path / "out", home)
    told = {
        path.name: path.read_text(errors="replace")
        for path in (tmp_path / "out").iterdir()
        if path.suffix != ".safetensors"
    }
    assert not [
        name for name, text in told.items() if "Ada" in text or str(tmp_path) in text or "completion" in text
    ]
    assert "by reviewer 1" in told["README.md"]
    assert "What people said at the desk is not in `recipe.yaml`" in told["README.md"]
    assert json.loads(told["lineage.json"])["artifacts"][find("tiny/dev1", home).root]["rows"]["count"] > 0


# ---------------------------------------------------------------- refused


def refused(home, out, *words: str, **options) -> None:
    with pytest.raises(LimbeckError) as caught:
        release("tiny/dev1", out, home, **options)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value
    assert not out.exists()
    assert not list(out.parent.glob(".*part"))


CLAIM = {
    "licence": "OpenAI-Terms",
    "stage": "dev1",
    "clause": "theirs",
    "reason": "we asked",
    "by": "Ada",
    "date": "2026-01-01",
}


def test_a_licence_that_forbids_it_is_refused_with_its_clause(copy, tmp_path):
    out = tmp_path / "m"
    refused(
        copy("MIT", "internal"),
        out,
        "dev1 cannot be released: internal",
        "declared `internal`",
        "train it without",
    )
    artifact, store = find_artifact("tiny/dev1", tmp_path / "runs")
    store.amend(artifact, {"licences": ["CC-BY-ND-4.0"]})
    refused(tmp_path / "runs", out, "CC-BY-ND-4.0", "section 2(a)(1)(B)", "creativecommons.org")
    store.amend(artifact, {"licences": ["undeclared"]})
    refused(tmp_path / "runs", out, "nobody knows the terms 'undeclared' of dev1", "declare its licence")
    store.amend(artifact, {"licences": ["OpenAI-Terms"]})
    refused(tmp_path / "runs", out, "OpenAI-Terms", "compete with OpenAI")
    store.amend(artifact, {"rights": [CLAIM]})
    assert release("tiny/dev1", out, tmp_path / "runs").folder == out
    card = (out / "README.md").read_text()
    assert "saying that they have the right to: “we asked” (2026-01-01)" in card
    assert "Ada" not in (out / "lineage.json").read_text()


def test_a_name_that_breaks_a_naming_duty_is_refused_with_the_remedy(copy, tmp_path):
    """As DeepSeek-R1-Distill-Llama-8B's would be: it does not begin with Llama."""
    home = copy("Llama-3.1", "MIT")
    out = tmp_path / "DeepSeek-R1-Distill-Llama-8B"
    refused(
        home,
        out,
        "DeepSeek-R1-Distill-Llama-8B: a model bound by Llama-3.1 must have a name that begins with 'Llama'",
        "section 1.b.i",
        "--name Llama-DeepSeek-R1-Distill-Llama-8B",
    )
    notes = release("tiny/dev1", out, home, name="Llama-tiny").notes
    assert "show “Built with Llama” where you present it" in notes
    card = (out / "README.md").read_text()
    assert card.partition("# Llama-tiny\n\n**Built with Llama**")[1]
    assert "license_name: Llama-3.1 AND MIT" in card
    assert "Llama 3.1 Community License" in (out / "NOTICE").read_text()
    artifact, store = find_artifact("tiny/dev1", home)
    store.amend(artifact, {"licences": ["Llama-3"]})
    refused(home, tmp_path / "Llama-tiny", "'Llama 3'", "--name Llama-3-Llama-tiny")
    assert release("tiny/dev1", tmp_path / "Llama-3-tiny", home).folder.exists()


def test_mistakes_are_one_sentence(call, finished, tmp_path, out):
    for arguments, words in (
        (("tiny/traces", tmp_path / "a"), "tiny/traces is a sample stage, which has no model to release"),
        (("tiny/zero", out), f"{out} is there already"),
        (
            ("tiny/zero", tmp_path / "b", "--gguf", "f16"),
            "model.type = WordLevel has no place in a GGUF file",
        ),
        (("tiny/zero", tmp_path / "b", "--gguf", "q9"), "there is no GGUF type 'q9'"),
    ):
        said = call("release", *arguments, "--runs", finished.home)
        assert said.code == 2
        assert words in said.err
        assert not said.out
    assert not (tmp_path / "b").exists()


def test_a_model_that_the_format_holds_goes_as_gguf_too(tmp_path):
    """A byte-level BPE model, brought in under MIT: its licence file and a GGUF file are in the directory."""
    pytest.importorskip("transformers")
    import checkpoints

    checkpoints.save("llama", tmp_path / "bpe", 280)
    checkpoints.save_tokenizer(tmp_path / "bpe")
    (tmp_path / "bpe" / "LICENSE").write_text("MIT License")
    (tmp_path / "bpe.yaml").write_text(
        "name: bpe\nthreads: 1\nstages: {base: {kind: load, path: bpe, licence: MIT}}\n"
    )
    code, _, err = answer("run", tmp_path / "bpe.yaml", "--runs", tmp_path / "runs")
    assert code == 0, err
    notes = release("base", tmp_path / "out", tmp_path / "runs").notes
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"out-f16.gguf", "base-LICENSE", "NOTICE"} <= names
    assert notes == ("MIT: keep the copyright notice and the licence's text",)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in card
    assert "It was not evaluated" in card
    assert "llama-cli -m out-f16.gguf" in card
    release("base", tmp_path / "bare", tmp_path / "runs", gguf="none")
    assert not list((tmp_path / "bare").glob("*.gguf"))
