"""Text as it streams: characters cut by tokens, tags and stops cut anywhere, events cut by the network."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai._streaming import SSEDecoder
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from limbeck.serve.openai.routes import event
from limbeck.text.detokenizer import IncrementalDetokenizer
from limbeck.text.reasoning_parser import CLOSE, OPEN, ReasoningParser, overlap, split_thought
from limbeck.text.tokenizer import Tokenizer

TEXTS = st.lists(
    st.sampled_from(
        ["a", " ", "\n", "é", "思", "🙂", "\u2028", "<", "/", ">", "think", OPEN, CLOSE, "stop", "<end>"]
    ),
    max_size=30,
).map("".join)


@pytest.fixture(scope="module")
def bytes_tokenizer() -> Tokenizer:
    """Every token is a byte or a few: characters beyond ASCII are cut."""
    backend = Backend(BPE())
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    trainer = trainers.BpeTrainer(
        vocab_size=270,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["think about a 思", "so 思考"], trainer)
    return Tokenizer(backend, "", end="<end>", pad="<end>")


def cut(draw, whole):
    """The same in pieces of any size."""
    places = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=12)))
    return [whole[a:b] for a, b in zip([0, *places], [*places, len(whole)], strict=True)]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_what_is_read_in_pieces_is_what_is_decoded_at_once(bytes_tokenizer, data):
    """Real texts and arbitrary bytes; text that is given early never ends in half a character."""
    text = data.draw(TEXTS)
    tokens = (
        bytes_tokenizer.encode(text)
        if data.draw(st.booleans())
        else data.draw(st.lists(st.integers(0, bytes_tokenizer.size - 1), max_size=90))
    )
    reader = IncrementalDetokenizer(bytes_tokenizer)
    pieces = [reader.read(part) for part in cut(data.draw, tokens)]
    assert "".join(pieces) + reader.close() == bytes_tokenizer.decode(tokens)


def test_a_reader_does_not_look_back_for_ever(bytes_tokenizer, tokenizer):
    for one in (bytes_tokenizer, tokenizer):
        reader, tokens = IncrementalDetokenizer(one), one.encode("5 1 6 " * 300)
        assert "".join(reader.read([token]) for token in tokens) + reader.close() == one.decode(tokens)
        assert len(reader.window) < 50


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_thought_and_answer_are_those_of_the_whole(data):
    """Wherever the text is cut: the parts of the whole text; of well-formed text those of `split_thought`."""
    text, opened = data.draw(TEXTS), data.draw(st.booleans())
    said = {}
    for parts in ([text], cut(data.draw, text)):
        speech, heard = ReasoningParser(opened), {"thought": "", "answer": ""}
        for kind, piece in [*(one for part in parts for one in speech.parse(part)), *speech.close()]:
            assert piece and piece == (piece if heard[kind] else piece.lstrip())
            heard[kind] += piece
        said[len(said)] = heard
    assert said[0] == said[1]
    whole = split_thought(OPEN + text if opened else text)
    if whole.wellformed and (opened or text.lstrip().startswith(OPEN)):
        assert said[0] == {"thought": whole.thought, "answer": whole.answer}


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_stops_end_an_answer_wherever_they_are_cut(data):
    text, stops = (
        data.draw(TEXTS),
        data.draw(st.lists(st.sampled_from(["stop", "a a", "\n\n", "思🙂", "<"]), max_size=3)),
    )
    speech = ReasoningParser(stops=stops, plain=True)
    heard = "".join(piece for part in cut(data.draw, text) for _, piece in speech.parse(part)) + "".join(
        piece for _, piece in speech.close()
    )
    ends = [text.index(stop) for stop in stops if stop in text]
    assert heard == text[: min(ends, default=len(text))] and speech.stopped == bool(ends)


def test_a_stop_does_not_end_a_thought():
    speech = ReasoningParser(stops=["\n\n"])
    assert speech.parse(f"{OPEN}one\n\ntwo{CLOSE}\n\nthree\n\nfour") == [
        ("thought", "one\n\ntwo"),
        ("answer", "three"),
    ]
    assert speech.stopped and speech.parse("more") == speech.close() == []


def test_overlaps():
    assert [overlap(text, CLOSE) for text in ("", "a", "<", "a</thin", CLOSE, "</</")] == [0, 0, 1, 6, 0, 2]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_events_survive_any_cuts_of_the_network(data):
    """As OpenAI's own client reads them; no text can begin an event of its own."""
    chunks = data.draw(
        st.lists(
            st.dictionaries(
                st.sampled_from(["content", "reasoning"]), TEXTS | st.just("\n\ndata: [DONE]\n\n")
            ),
            max_size=5,
        )
    )
    wire = b"".join(map(event, chunks)) + b"data: [DONE]\n\n"
    events = [one.data for one in SSEDecoder().iter_bytes(iter(cut(data.draw, wire)))]
    assert events[-1] == "[DONE]" and [json.loads(one) for one in events[:-1]] == chunks
