"""Passkey documents: a long varied text with one five-digit key in it, and a question for that key.

The haystack comes from a small grammar rather than from one repeated sentence: repeated filler is so easy to
compress that keeping almost nothing still finds the key. All numbers in the filler are words, so the five digits
stand in the key sentence and nowhere else. A document is a pure function of (tokenizer, tokens, depth, seed).
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

INTRO = "There is one important pass key hidden in the text below. Find it and remember it."
NEEDLE = "The pass key for {name} is {key}. Remember it. {key} is the pass key for {name}."
QUESTION = "What is the pass key for {name}? Answer with the number."


def listed(text: str) -> list[str]:
    """The items of a text that separates them by `|`, wherever its lines break."""
    return [item.strip() for item in text.split("|")]


NAMES = listed("""Alice|Bruno|Carla|Dmitri|Elena|Farid|Greta|Hugo|Ingrid|Jonas|Katya|Leon|Marta|Nadia|Oscar|Paula
|Quentin|Rosa|Stefan|Tamara|Ulrich|Vera|Walter|Yasmin""")

SLOTS: dict[str, Sequence[str]] = {
    "who": listed("""the baker|the old fisherman|a young teacher|the postman|two gardeners|the miller
|a tired nurse|the clockmaker|the ferry captain|three students|the librarian|a travelling musician|the blacksmith
|the beekeeper|a retired judge|the tailor|the lighthouse keeper|some carpenters|the innkeeper|a shy botanist
|the night guard|an apprentice cook|the stonemason|the weaver"""),
    "where": listed("""at the harbour|behind the town hall|near the northern gate|beside the river
|on the market square|under the stone bridge|in the orchard|by the railway station|at the edge of the forest
|inside the old theatre|along the canal|in the village school|on the southern hill|close to the windmill
|in the botanical garden|at the foot of the mountain|in front of the museum|next to the bakery|at the crossroads
|beyond the last houses|on the long beach|in the abandoned quarry|at the ferry landing|in the chapel yard"""),
    "what": listed("""a wooden crate|the blue lantern|some ripe pears|an iron kettle|a bundle of letters
|the broken clock|a basket of eggs|a rolled carpet|two copper pots|an old map|a sack of flour|the painted sign
|a pair of boots|a silver whistle|the heavy ladder|a jar of honey|some woollen blankets|a box of candles
|the green umbrella|a length of rope|a loaf of rye bread|the brass telescope|a cart of firewood|a tin of paint"""),
    "how": listed("""slowly|carefully|without a word|in good spirits|with great patience|rather late|as usual
|twice|in a hurry|for the first time|almost by accident|with a smile|reluctantly|before lunch|after the rain
|just in time"""),
    "when": listed("""early in the morning|on a grey afternoon|last autumn|before sunset|during the long winter
|on the day of the fair|shortly after noon|at the end of spring|on a windy evening|when the bells rang
|late in the summer|one quiet Sunday|after the harvest|in the first week of the year|during the storm
|while the tide was low"""),
    "many": listed("""two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|fifteen|twenty|thirty|forty|sixty
|a hundred|several|a dozen|nearly fifty"""),
    "kind": listed("""sparrows|rowing boats|apple trees|wagons|visitors|windows|goats|lamps|barrels|fences
|chimneys|ducklings|kites|puddles|market stalls|tulips"""),
    "sky": listed("""grey|clear|pale|heavy with clouds|bright|almost white|full of swallows|red in the west|calm
|hazy|dark to the north|blue and empty"""),
    "trait": listed("""warm|crooked|narrow|quiet|dusty|cheerful|damp|famous|steep|crowded|forgotten|sunny|plain
|weathered|spacious|modest"""),
    "thing": listed("""path|courtyard|wall|workshop|kitchen|garden|stairway|tower|cellar|barn|street|bridge|roof
|fountain|stable|hall"""),
}

TEMPLATES: tuple[str, ...] = (
    "{who} carried {what} {where} {how}",
    "{when}, {who} left {what} {where}",
    "{many} {kind} could be seen {where} {when}",
    "the sky was {sky} and {who} waited {where}",
    "{who} asked about {what}, but nobody {where} had seen it",
    "{when} the {thing} looked {trait}, and {who} repaired it {how}",
    "people {where} still talk about {who} and {what}",
    "it took {who} {many} days to bring {what} home",
    "{where} there was a {trait} {thing} with {many} {kind} around it",
    "{who} and {who} met {where} {when}",
    "nobody knew why {who} had hidden {what} {where}",
    "the {thing} {where} is {trait}, although {who} paints it every year",
    "{when}, the wind moved {what} all the way to the {thing}",
    "for {many} years {who} has kept {what} in the {thing}",
    "the {trait} {thing} belonged to {who} until it was sold {when}",
    "{who} counted {many} {kind} {where} and went home {how}",
    "if the sky is {sky}, {who} usually stays {where}",
    "{what} was traded for {many} {kind} {when}",
    "a letter from {who} described the {trait} {thing} {where}",
    "{when} {who} sang {where} while {who} mended {what}",
    "there were {many} {kind} on the {thing}, and the sky was {sky}",
    "{who} found {what} under the {thing} {how}",
    "from the {thing} one could watch {who} working {where}",
    "{who} promised to return {what} {when}",
    "the road to the {thing} is {trait} and passes {many} {kind}",
    "{who} told a story about {what} and a {trait} {thing}",
    "{where} the water was {trait}, and {many} {kind} rested there {when}",
    "{when}, {who} bought {what} from {who}",
    "neither {who} nor {who} remembered the {thing} {where}",
    "{who} drew the {trait} {thing} {how} and gave the picture away",
    "the children chased {many} {kind} {where} {when}",
    "{what} stood in the {thing}, where {who} had put it {how}",
    "in the {trait} {thing}, {who} baked bread for {many} guests",
    "{who} sold {what} {where}, because the {thing} was too {trait}",
    "the sky turned {sky} {when}, so {who} closed the {thing}",
    "{many} {kind} and {what} were all that {who} owned",
)

SHORT: tuple[str, ...] = (
    "Yes.",
    "So it was.", "It rained.", "Time passed.", "The tea was warm.", "A dog barked twice.", "Nobody answered at first.",
    "The bread was still warm.", "Later the street was quiet again.", "They walked home along the river together.",
)  # fmt: skip

SENTENCES_PER_PARAGRAPH = 7
SMALLEST = 300


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    def __call__(self, text: str, **kwargs: Any) -> Any: ...

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...

    def decode(self, ids: Any, **kwargs: Any) -> Any: ...


@dataclass(frozen=True)
class Passkey:
    """One case. `tokens` counts the whole prompt as the server sees it, chat template included."""

    document: str
    question: str
    answer: str
    depth: float
    seed: int
    tokens: int
    needle: str

    @property
    def content(self) -> str:
        """The user message."""
        return f"{self.document}\n\n{self.question}"

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.content}]

    def found_in(self, text: str) -> bool:
        """Whether an answer names the key, as a number of its own."""
        return re.search(rf"(?<!\d){self.answer}(?!\d)", text) is not None


def count(tokenizer: Tokenizer, text: str) -> int:
    """Tokens of a text, with no special tokens added."""
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def render(tokenizer: Tokenizer, content: str) -> str:
    """The prompt's text as a server renders one user message."""
    messages = [{"role": "user", "content": content}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def filler(rng: random.Random) -> str:
    """One filler sentence. The same slot twice in a template gives two different fillings."""
    template = rng.choice(TEMPLATES)
    slots = re.findall(r"{(\w+)}", template)
    drawn = {slot: rng.sample(SLOTS[slot], slots.count(slot)) for slot in dict.fromkeys(slots)}
    text = re.sub(r"{(\w+)}", lambda match: drawn[match[1]].pop(), template)
    return text[0].upper() + text[1:] + "."


def assemble(sentences: Sequence[str], needle: str, index: int) -> str:
    """The document: introduction, then paragraphs with the needle before sentence `index`."""
    lines = [*sentences[:index], needle, *sentences[index:]]
    step = SENTENCES_PER_PARAGRAPH
    return "\n\n".join([INTRO, *(" ".join(lines[i : i + step]) for i in range(0, len(lines), step))])


def place(counts: Sequence[int], depth: float) -> int:
    """The sentence boundary whose share of the filler tokens before it is nearest to `depth`."""
    target, total, best = depth * sum(counts), 0, 0
    distance = target
    for index, tokens in enumerate(counts, 1):
        total += tokens
        if abs(total - target) < distance:
            best, distance = index, abs(total - target)
    return best


class _Draft:
    """A document in the making: filler sentences with their token counts, around a key sentence."""

    def __init__(self, tokenizer: Tokenizer, tokens: int, depth: float, seed: int) -> None:
        self.tokenizer, self.depth, self.seed = tokenizer, depth, seed
        self.rng = random.Random(f"passkey/{seed}/{depth:.6f}/{tokens}")
        self.answer, name = str(self.rng.randrange(10_000, 100_000)), self.rng.choice(NAMES)
        self.needle, self.question = NEEDLE.format(name=name, key=self.answer), QUESTION.format(name=name)
        self.sentences: list[str] = []
        self.counts: list[int] = []
        self.seen: set[str] = set()

    def cost(self, sentence: str) -> int:
        return count(self.tokenizer, " " + sentence)

    def fresh(self) -> str:
        """A sentence that this document hasn't got yet."""
        while (sentence := filler(self.rng)) in self.seen:
            pass
        self.seen.add(sentence)
        return sentence

    def push(self, sentence: str) -> int:
        self.sentences.append(sentence)
        self.counts.append(self.cost(sentence))
        return self.counts[-1]

    def pop(self) -> int:
        self.sentences.pop()
        return self.counts.pop()

    def case(self) -> Passkey:
        document = assemble(self.sentences, self.needle, place(self.counts, self.depth))
        length = count(self.tokenizer, render(self.tokenizer, f"{document}\n\n{self.question}"))
        return Passkey(document, self.question, self.answer, self.depth, self.seed, length, self.needle)

    def longer(self, tokens: int, gap: int) -> Passkey | None:
        """The case with one more sentence, the longest of some offers with which it still fits."""
        offers = {text: self.cost(text) for text in [*(self.fresh() for _ in range(32)), *SHORT]}
        for sentence in sorted(offers, key=offers.__getitem__, reverse=True):
            if offers[sentence] <= gap:
                self.push(sentence)
                case = self.case()
                if case.tokens <= tokens:
                    return case
                self.pop()
        return None


def make_passkey(tokenizer: Tokenizer, tokens: int, depth: float, seed: int) -> Passkey:
    """A document whose whole prompt has at most `tokens` tokens and at least 99 % of them."""
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth {depth} is outside 0..1")
    if tokens < SMALLEST:
        raise ValueError(f"{tokens} tokens are too few: a passkey document needs at least {SMALLEST}")
    draft = _Draft(tokenizer, tokens, depth, seed)
    room = tokens - draft.case().tokens
    while room > 0:
        room -= draft.push(draft.fresh())
    # Counts of single sentences don't add up exactly: measure the whole, and take away what is too much.
    case = draft.case()
    while (excess := case.tokens - tokens) > 0 and draft.sentences:
        while excess > 0 and draft.sentences:
            excess -= draft.pop()
        case = draft.case()
    while (gap := tokens - case.tokens) > tokens // 200:
        longer = draft.longer(tokens, gap)
        if longer is None:
            break
        case = longer
    if not 0.99 * tokens <= case.tokens <= tokens:
        raise ValueError(f"no document of {tokens} tokens within 1 %: {case.tokens} (seed {seed}, depth {depth})")
    return case


def depths(columns: int) -> list[float]:
    """Depths spread evenly over 0.03 .. 0.97."""
    if columns == 1:
        return [0.5]
    return [round(0.03 + 0.94 * index / (columns - 1), 4) for index in range(columns)]


def make_suite(tokenizer: Tokenizer, tokens: int, documents: int, columns: int, seed: int) -> list[Passkey]:
    """`documents` different cases that walk through `columns` depths again and again."""
    at = depths(min(columns, documents))
    return [make_passkey(tokenizer, tokens, at[i % len(at)], seed * 100_000 + i) for i in range(documents)]


def needle_span(tokenizer: Tokenizer, case: Passkey) -> tuple[int, int]:
    """First and past-the-last prompt token that hold a part of the key sentence (needs a fast tokenizer)."""
    text = render(tokenizer, case.content)
    first = text.index(case.needle)
    last = first + len(case.needle)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    inside = [i for i, (start, end) in enumerate(offsets) if start < last and end > first]
    return inside[0], inside[-1] + 1
