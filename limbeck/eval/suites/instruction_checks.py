"""The 25 checks of IFEval (Zhou et al. 2023, arXiv 2311.07911, table 1): does a response follow a verifiable
instruction?

Each check takes the response and the instruction's arguments as published, and follows the published code
(google-research, `instruction_following_eval`, as corrected in lm-eval 0.4.13), its quirks included. Three
need the package langdetect, two need nltk with its data `punkt_tab`."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import Any

Check = Callable[..., bool]
LESS = "less than"
OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def _compare(count: int, relation: str, threshold: int) -> bool:
    """Return True if a count is `less than` or `at least` the threshold."""
    return count < threshold if relation == LESS else count >= threshold


# ---------------------------------------------------------------- keywords and letters


def include_keywords(text: str, keywords: list[str]) -> bool:
    """True if every keyword, a regular expression, occurs."""
    return all(re.search(keyword, text, re.IGNORECASE) for keyword in keywords)


def keyword_frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    """True if a keyword occurs less than, or at least, so many times."""
    return _compare(len(re.findall(keyword.strip(), text, re.IGNORECASE)), relation, frequency)


def forbidden_words(text: str, forbidden_words: list[str]) -> bool:
    """True if none of the words occurs as a whole word."""
    return not any(re.search(rf"\b{word}\b", text, re.IGNORECASE) for word in forbidden_words)


def letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    """True if a letter or other character occurs less than, or at least, so many times."""
    return _compare(Counter(text.lower())[letter.strip().lower()], let_relation, let_frequency)


# ---------------------------------------------------------------- language and case


def response_language(text: str, language: str) -> bool:
    """True if the response is in the language with this code, or in none that can be detected."""
    return _detect(text) in (language, None)


def english_capital(text: str) -> bool:
    """True if the response is English in capital letters."""
    return text.isupper() and _detect(text) in ("en", None)


def english_lowercase(text: str) -> bool:
    """True if the response is English in small letters."""
    return text.islower() and _detect(text) in ("en", None)


def capital_word_frequency(text: str, capital_frequency: int, capital_relation: str) -> bool:
    """True if less than, or at least, so many words are in capital letters."""
    import nltk

    words = [word for word in nltk.word_tokenize(text) if word.isupper()]
    return _compare(len(words), capital_relation, capital_frequency)


def _detect(text: str) -> str | None:
    """Return the code of the language of a text, None if it has no features of any. The seed is fixed, since
    langdetect draws random numbers."""
    import langdetect

    langdetect.DetectorFactory.seed = 0
    try:
        return langdetect.detect(text)
    except langdetect.LangDetectException:
        return None


# ---------------------------------------------------------------- length


def number_words(text: str, num_words: int, relation: str) -> bool:
    """True if the response has less than, or at least, so many words."""
    return _compare(len(re.findall(r"\w+", text)), relation, num_words)


def number_sentences(text: str, num_sentences: int, relation: str) -> bool:
    """True if the response has less than, or at least, so many sentences."""
    import nltk

    return _compare(len(nltk.sent_tokenize(text)), relation, num_sentences)


def number_paragraphs(text: str, num_paragraphs: int) -> bool:
    """True if `***` divides the response into so many paragraphs, none of them empty but at the ends."""
    paragraphs = re.split(r"\s?\*\*\*\s?", text)
    if not all(part.strip() for part in paragraphs[1:-1]):
        return False
    ends = [0] if len(paragraphs) == 1 else [0, -1]
    return len(paragraphs) - sum(not paragraphs[end].strip() for end in ends) == num_paragraphs


def nth_paragraph_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """True if empty lines divide the response into so many paragraphs, and the n-th begins with a word."""
    paragraphs = text.split("\n\n")
    filled = sum(bool(paragraph.strip()) for paragraph in paragraphs)
    if nth_paragraph > filled or not paragraphs[nth_paragraph - 1].strip():
        return False
    word = paragraphs[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    word = re.split(r"""[.,?!'"]""", word)[0].lower()
    return filled == num_paragraphs and word == first_word.lower()


# ---------------------------------------------------------------- content and format


def number_placeholders(text: str, num_placeholders: int) -> bool:
    """True if there are at least so many placeholders in square brackets."""
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


def postscript(text: str, postscript_marker: str) -> bool:
    """True if there is a postscript that begins with the marker."""
    marker = postscript_marker.strip()
    patterns = {"P.P.S": r"\s*p\.\s?p\.\s?s.*$", "P.S.": r"\s*p\.\s?s\..*$"}
    pattern = patterns.get(marker, rf"\s*{marker.lower()}.*$")
    return bool(re.search(pattern, text.lower(), re.MULTILINE))


def number_bullet_lists(text: str, num_bullets: int) -> bool:
    """True if there are exactly so many bullet points."""
    stars = re.findall(r"^\s*\*[^\*].*$", text, re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", text, re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


def constrained_response(text: str) -> bool:
    """True if the response contains one of three sentences."""
    return any(option in text for option in OPTIONS)


def number_highlighted_sections(text: str, num_highlights: int) -> bool:
    """True if at least so many parts are highlighted with one or two stars."""
    single = [part.strip("*") for part in re.findall(r"\*[^\n\*]*\*", text)]
    double = re.findall(r"\*\*([^\n\*]*)\*\*", text)
    return sum(bool(part.strip()) for part in single + double) >= num_highlights


def multiple_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    """True if there are at least so many sections with a numbered heading."""
    parts = re.split(rf"\s?{section_spliter.strip()}\s?\d+\s?", text)
    return len(parts) - 1 >= num_sections


def json_format(text: str) -> bool:
    """True if the response is JSON, with or without a fence."""
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def title(text: str) -> bool:
    """True if there is a title in double angular brackets."""
    return any(found.lstrip("<").rstrip(">").strip() for found in re.findall(r"<<[^\n]+>>", text))


# ---------------------------------------------------------------- combinations, beginning and end


def two_responses(text: str) -> bool:
    """True if there are two different responses, separated by six stars."""
    parts = text.split("******")
    if not all(part.strip() for part in parts[1:-1]):
        return False
    filled = [part.strip() for part in parts if part.strip()]
    return len(filled) == 2 and filled[0] != filled[1]


def repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    """True if the response begins with the request."""
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(text: str, end_phrase: str) -> bool:
    """True if the response ends with a phrase."""
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(text: str) -> bool:
    """True if the whole response is in double quotation marks."""
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def no_comma(text: str) -> bool:
    """True if there is no comma."""
    return "," not in text


CHECKS: dict[str, Check] = {
    "keywords:existence": include_keywords,
    "keywords:frequency": keyword_frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": response_language,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": number_words,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "punctuation:no_comma": no_comma,
}
LANGDETECT = {
    "language:response_language",
    "change_case:english_capital",
    "change_case:english_lowercase",
}
NLTK = {"length_constraints:number_sentences", "change_case:capital_word_frequency"}


@lru_cache
def missing_package(instruction: str) -> str:
    """Return what the check of an instruction lacks on this machine, as the end of a sentence with the
    remedy; "" if nothing."""
    if instruction in LANGDETECT:
        try:
            import langdetect  # noqa: F401
        except ImportError:
            return "needs the package langdetect: `pip install 'limbeck[eval]'`"
    if instruction in NLTK:
        try:
            import nltk

            nltk.data.find("tokenizers/punkt_tab")
        except (ImportError, LookupError):
            return (
                "needs nltk and its data: `pip install 'limbeck[eval]'` and "
                "`python -m nltk.downloader punkt_tab`"
            )
    return ""


def follows(instruction: str, arguments: dict[str, Any], text: str) -> bool:
    """Return True if a response follows an instruction; an empty response follows none."""
    return bool(text.strip()) and CHECKS[instruction](text, **arguments)


def loosened(text: str) -> list[str]:
    """Return the response and its seven loosened forms: without stars, without its first line, its last line
    or both (section 2.2 of the paper)."""
    lines = text.split("\n")
    forms = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return forms + [form.replace("*", "") for form in forms]
