"""LongBench's metrics (Bai et al. 2023, arXiv 2308.14508), each from 0 to 1.

Differences from the published scripts: Chinese is compared by character, where they cut it into words by jieba, and
ROUGE-L is the F1 of the longest common subsequence, by word, where they use the package `rouge`.
"""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Sequence

Words = Sequence[str]
CHINESE_PUNCTUATION = "！？。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～、。〃》「」『』【】〔〕《“”‘’…"  # noqa: RUF001


def english_words(text: str) -> list[str]:
    """In lower case, without punctuation and articles."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def chinese_characters(text: str) -> list[str]:
    """Without punctuation and white space."""
    ignored = string.punctuation + CHINESE_PUNCTUATION
    return [character for character in text.lower() if character not in ignored and not character.isspace()]


def f1(answer: Words, reference: Words) -> float:
    """Of the words that both have, each as often as both have it."""
    same = sum((Counter(answer) & Counter(reference)).values())
    if not same:
        return 0.0
    precision, recall = same / len(answer), same / len(reference)
    return 2 * precision * recall / (precision + recall)


def rouge_l(answer: Words, reference: Words) -> float:
    """F1 of the longest common subsequence."""
    lengths = [0] * (len(reference) + 1)
    for word in answer:
        before = 0
        for place, other in enumerate(reference, 1):
            kept = lengths[place]
            lengths[place] = before + 1 if word == other else max(kept, lengths[place - 1])
            before = kept
    if not lengths[-1]:
        return 0.0
    precision, recall = lengths[-1] / len(answer), lengths[-1] / len(reference)
    return 2 * precision * recall / (precision + recall)


def classification(answer: str, reference: str, classes: Sequence[str]) -> float:
    """1 over the number of classes that the answer names, if the right one is among them.

    A class whose name is a part of the right one's isn't counted.
    """
    named = [name for name in classes if name in answer]
    named = [name for name in named if name == reference or name not in reference]
    return 1 / len(named) if reference in named else 0.0


def count(answer: str, reference: str) -> float:
    """Share of the answer's numbers that are the right one."""
    found = re.findall(r"\d+", answer)
    return found.count(str(reference)) / len(found) if found else 0.0


def retrieval(answer: str, reference: str) -> float:
    """The same with the number of the paragraph that the reference names ("Paragraph 7", "段落7")."""
    wanted = re.search(r"\d+", reference)
    return count(answer, wanted[0]) if wanted else 0.0


def code_line(answer: str) -> str:
    """The answer's first line that is neither a comment nor a code fence."""
    for line in answer.lstrip("\n").split("\n"):
        if not any(mark in line for mark in ("`", "#", "//")):
            return line
    return ""


def edit_similarity(answer: str, reference: str) -> float:
    """Ratcliff and Obershelp's ratio of the first line of code to the right one, in whole percents."""
    return round(100 * difflib.SequenceMatcher(None, code_line(answer), reference).ratio()) / 100
