r"""Prompt syntax: words that count more or less, words that change from step to step, and long texts.

    (red:1.3)          counts 1.3 times, from 0 to 2; inside each other they multiply
    [cow|horse]        the steps take turns: cow, horse, cow, horse, ...
    [cow:horse:0.4]    cow in the first 0.4 of the steps, then horse; either may be empty
    \( \) \[ \] \| \: \_   the character itself

The forms are those of AUTOMATIC1111's stable-diffusion-webui, the explicit ones only: all other brackets are
text, and a text without these forms is read as it stands. Reading them needs no torch.

Shapes: L tokens, D width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

SYNTAX = ("off", "on")
LONG = ("cut", "chunks")
HEAVIEST = 2.0  # where shapes of the embedded weights begin to dissolve
MOST_WEIGHTS = 8  # different ones in a text: for each the encoder reads the text once more
MOST_VARIANTS = 16  # texts that one picture may be drawn from: each is encoded, and kept for all steps
DEEPEST = 20  # brackets inside each other


@dataclass(frozen=True)
class Words:
    """A text as a step reads it, without its brackets."""

    text: str
    weights: tuple[float, ...] = ()  # one for each character; empty: all are 1

    def cleaned(self) -> Words:
        """In small letters and without spaces at its ends, as the networks were trained to read."""
        text = self.text.lower()
        weights = self.weights
        if weights and len(text) != len(self.text):  # a dotted capital I becomes two characters
            weights = tuple(
                weight for one, weight in zip(self.text, weights, strict=True) for _ in one.lower()
            )
        return Words(text, weights).part(0, len(text))

    def part(self, start: int, end: int) -> Words:
        """From one character to before another, without spaces at the ends."""
        text = self.text[start:end].rstrip()
        start += len(text) - len(text.lstrip())
        weights = self.weights[start : start + len(text.lstrip())]
        return Words(text.lstrip(), () if all(one == 1 for one in weights) else weights)


# --- Reading -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weighted:
    """Parts that count `weight` times."""

    parts: Parts
    weight: float
    depth: int


@dataclass(frozen=True)
class Turns:
    """The steps take these in turn."""

    options: tuple[Parts, ...]
    depth: int


@dataclass(frozen=True)
class Switch:
    """One until `when` of the steps are done, then the other."""

    before: Parts
    after: Parts
    when: float  # 0 to 1
    depth: int


Parts = tuple["str | Weighted | Turns | Switch", ...]

_PAIRS = {")": "(", "]": "["}
_ESCAPED = frozenset("()[]|:_")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)")
_LOST = re.compile(r":\s*\d*\.\d")  # the end of a "(words:1.3)" that was never closed


class _Mark:
    """A | or : that may separate, so long as no bracket around it turns out to be text."""

    def __init__(self, sign: str) -> None:
        self.sign = sign


_BAR, _COLON = _Mark("|"), _Mark(":")
_MARKS = {"|": _BAR, ":": _COLON}


@dataclass
class _Open:
    """A bracket whose end has not come yet."""

    sign: str
    at: int
    items: list[Any] = field(default_factory=list)  # pieces of text, marks, and what was read already
    bar: bool = False  # whether _BAR is among them


@lru_cache(maxsize=64)
def parse(text: str) -> Parts:
    """The parts of a text. Raises ValueError, with the place, for what is half written or out of range.

    Takes time in proportion to the text, whatever its brackets are.
    """
    stack = [_Open("", 0)]
    opened = {"(": 0, "[": 0}  # how many of each in the stack
    index = 0
    while index < len(text):
        sign = text[index]
        if sign == "\\" and text[index + 1 : index + 2] in _ESCAPED:
            stack[-1].items.append(text[index + 1])
            index += 2
            continue
        if sign in opened:
            stack.append(_Open(sign, index))
            opened[sign] += 1
        elif sign in _PAIRS:
            if opened[_PAIRS[sign]]:
                _close(text, index, stack, opened)
            elif stack[-1].bar if sign == "]" else "." in (_number(stack[-1].items) or (0, ""))[1]:
                raise _half("ends nothing", sign, index)
            else:
                stack[-1].items.append(sign)
        else:
            stack[-1].items.append(_MARKS.get(sign, sign))
            stack[-1].bar |= sign == "|"
        index += 1
    for one in stack[1:]:
        _check_text(one)
    return _joined([item for one in stack for item in (one.sign, *one.items)])


def _close(text: str, index: int, stack: list[_Open], opened: dict[str, int]) -> None:
    """The bracket at `index`, for which there is one in the stack."""
    crossed = []
    while stack[-1].sign != _PAIRS[text[index]]:
        crossed.append(stack.pop())
        _check_text(crossed[-1])
    own = stack.pop()
    for one in (own, *crossed):
        opened[one.sign] -= 1
    for one in reversed(crossed):
        own.items += [one.sign, *one.items]
        own.bar |= one.bar
    found = _meaning(own, text[own.at : index + 1])
    if crossed and found is not None:
        raise _half(f"is not closed before the {text[index]}", crossed[-1].sign, crossed[-1].at)
    stack[-1].items += _joined([own.sign, *own.items, text[index]]) if found is None else [found]


def _check_text(one: _Open) -> None:
    """Raises ValueError for a bracket that was never closed, unless it reads like text."""
    words = (item.sign if isinstance(item, _Mark) else item for item in one.items)
    if one.bar if one.sign == "[" else _LOST.search("".join(word for word in words if isinstance(word, str))):
        raise _half("is never closed", one.sign, one.at)


def _half(what: str, sign: str, at: int) -> ValueError:
    return ValueError(f"the {sign} at character {at + 1} {what}; write \\{sign} for a bracket in the text")


def _meaning(own: _Open, written: str) -> Weighted | Turns | Switch | None:
    """What a pair of brackets means; None when it is text."""
    items, number = own.items, _number(own.items)
    shown = written if len(written) <= 40 else written[:37] + "..."
    place = f"{shown} at character {own.at + 1}"
    found: Weighted | Turns | Switch
    if own.bar and own.sign == "[":
        options = tuple(_joined(part) for part in _split(items, _BAR))
        if not any(options):
            raise ValueError(f"{place} holds nothing to take turns")
        found = Turns(options, _depth(items))
    elif number is None:
        return None
    elif own.sign == "(":
        parts = _joined(items[: number[0]])
        if not 0 <= float(number[1]) <= HEAVIEST:
            raise ValueError(
                f"the weight of {place} is {number[1]}, which is not from 0 to {HEAVIEST:g}; "
                "write \\( for a bracket in the text"
            )
        if not parts:
            raise ValueError(f"{place} holds no words")
        found = Weighted(parts, float(number[1]), _depth(items))
    else:
        cut = _split(items[: number[0]], _COLON)
        if len(cut) != 2:
            return None
        if not 0 <= float(number[1]) <= 1:
            raise ValueError(
                f"{place} changes after {number[1]} of the steps, which is not from 0 to 1; "
                "write \\[ for a bracket in the text"
            )
        found = Switch(_joined(cut[0]), _joined(cut[1]), float(number[1]), _depth(items))
    if found.depth > DEEPEST:
        raise ValueError(f"brackets are more than {DEEPEST} deep inside each other at character {own.at + 1}")
    return found


def _depth(items: Sequence[Any]) -> int:
    return 1 + max((one.depth for one in items if isinstance(one, Weighted | Turns | Switch)), default=0)


def _number(items: Sequence[Any]) -> tuple[int, str] | None:
    """Where the last colon is, and the number behind it, when there is nothing but a number."""
    for back in range(1, min(len(items), 40) + 1):
        if items[-back] is _COLON:
            word = "".join(items[len(items) - back + 1 :]).strip()
            return (len(items) - back, word) if _NUMBER.fullmatch(word) else None
        if not isinstance(items[-back], str):
            return None
    return None


def _split(items: Sequence[Any], mark: _Mark) -> list[list[Any]]:
    parts: list[list[Any]] = [[]]
    for item in items:
        if item is mark:
            parts.append([])
        else:
            parts[-1].append(item)
    return parts


def _joined(items: Sequence[Any]) -> Parts:
    """Neighbouring pieces of text in one, marks as the characters that they are."""
    parts: list[Any] = []
    letters: list[str] = []
    for item in items:
        if isinstance(item, str | _Mark):
            letters.append(item if isinstance(item, str) else item.sign)
            continue
        parts += ["".join(letters), item]
        letters = []
    return tuple(part for part in (*parts, "".join(letters)) if part != "")


# --- What each step reads ------------------------------------------------------------------------------


def at_step(parts: Parts, index: int, count: int) -> Words:
    """What step `index`, from 0, of `count` reads. Raises ValueError for nested weights that multiply to more
    than the most."""
    text: list[str] = []
    weights: list[float] = []
    gap = False  # nothing stood between two spaces: one of them is left out

    def add(parts: Parts, weight: float) -> None:
        nonlocal gap
        for part in parts:
            if isinstance(part, str):
                if gap and part[0] == " " and (not text or text[-1] == " "):
                    part = part[1:]
                text.extend(part)
                weights.extend([weight] * len(part))
                gap = False
            elif isinstance(part, Weighted):
                product = round(weight * part.weight, 6)  # 1.25 of 0.8 is 1
                if product > HEAVIEST:
                    raise ValueError(
                        f"weights inside each other multiply to {product:g}; the most is {HEAVIEST:g}"
                    )
                add(part.parts, product)
            else:
                if isinstance(part, Turns):
                    chosen = part.options[index % len(part.options)]
                else:
                    chosen = part.before if index < round(part.when * count) else part.after
                gap = gap or not chosen
                add(chosen, weight)

    add(parts, 1.0)
    if len(set(weights) - {1.0}) > MOST_WEIGHTS:
        raise ValueError(f"there are more than {MOST_WEIGHTS} different weights in one text; use fewer")
    return Words("".join(text), () if all(one == 1 for one in weights) else tuple(weights))


def changes(parts: Parts) -> bool:
    """Whether steps read different words."""
    return any(
        isinstance(part, Turns | Switch) or (isinstance(part, Weighted) and changes(part.parts))
        for part in parts
    )


def read(text: str, index: int = 0, count: int = 1) -> Words:
    """What a step reads of a text with syntax."""
    return at_step(parse(text), index, count)


Row = tuple[Words, ...]  # what all texts of a batch are at one step
States = tuple["Tensor", "Tensor"]  # vectors (B, L, D) and their mask (B, L)


@dataclass(frozen=True)
class TextTurns:
    """Text states of all that the steps read, and which of them each step takes."""

    states: Sequence[States]
    turns: Sequence[int]

    @property
    def taken(self) -> dict[int, States]:
        """Those that any step takes."""
        return {turn: self.states[turn] for turn in sorted(set(self.turns))}

    def at(self, step: int) -> States:
        return self.states[self.turns[step]]

    def during(self, first: int, count: int) -> States | tuple[TextTurns, None]:
        """For some of the steps, counted from 0 again: vectors and mask where all take the same."""
        part = TextTurns(self.states, self.turns[first : first + count])
        return part.at(0) if len(part.taken) == 1 else (part, None)


def variants(texts: Sequence[str], count: int, syntax: str = "on") -> tuple[list[Row], list[int]]:
    """All that is read in `count` steps, each once, and which of it each step reads.

    Raises ValueError as `parse` does, and for more than MOST_VARIANTS.
    """
    if syntax == "off":
        return [tuple(Words(text) for text in texts)], [0] * count
    parsed = [parse(text) for text in texts]
    if not any(map(changes, parsed)):
        return [tuple(at_step(parts, 0, count) for parts in parsed)], [0] * count
    found: dict[Row, int] = {}
    turns = []
    for index in range(count):
        row = tuple(at_step(parts, index, count) for parts in parsed)
        turns.append(found.setdefault(row, len(found)))
        if len(found) > MOST_VARIANTS:
            raise ValueError(
                f"the brackets make more than {MOST_VARIANTS} different texts, and each is encoded; "
                "let fewer words take turns"
            )
    return [*found], turns


# --- Tokens --------------------------------------------------------------------------------------------

Tokenizer = Any  # ours, or one of transformers'


def spans(tokenizer: Tokenizer, text: str) -> list[tuple[int, int]]:
    """For each token the characters that it stands for; (0, 0) for the end token.

    Raises ValueError for a tokenizer that does not know: those of transformers without a tokenizer.json.
    """
    backend: Any = getattr(tokenizer, "backend", None)
    if hasattr(backend, "encode") and not isinstance(backend, str):  # theirs names its kind there
        return list(backend.encode(text).offsets)
    try:
        return list(tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"])
    except (NotImplementedError, KeyError) as error:
        raise ValueError(
            "this tokenizer does not tell which words its tokens stand for, so words cannot be weighted; its "
            "folder lacks a tokenizer.json"
        ) from error


def token_weights(tokenizer: Tokenizer, words: Words, limit: int) -> list[float]:
    """How much each token counts: as most of its characters do, spaces apart; 1 for the end token.

    `limit`: tokens that are read, the last of them the end token.
    """
    found = []
    for start, end in spans(tokenizer, words.text):
        own = [words.weights[at] for at in range(start, end) if not words.text[at].isspace()]
        found.append(max(own, key=own.count) if own else 1.0)
    return found if len(found) <= limit else [*found[: limit - 1], found[-1]]


def weigh(
    vectors_LD: Tensor,
    ids: Sequence[int],
    weights: Sequence[float],  # of each token
    encode: Callable[[Sequence[int]], Tensor],  # tokens to vectors (L, D)
    neutral_D: Tensor,
) -> Tensor:
    """Move a text's vectors towards (below 1) or away from (above 1) those of the text without the words.

    For each weight w: vectors + (w - 1) * (vectors - without), where `without` is the same text encoded after
    its words of this weight were deleted; in their own places stands `neutral_D`, the vector of the empty
    text. At 1 nothing happens, to the bit, and at 0 the words were never said.

    Scaling the words' own vectors, as is done with CLIP, does next to nothing here, for T5 tells every token
    of all the others: with the embedded weights "a (red:0) cube" stayed red. So all vectors move. Going
    towards the prompt without the words is how compel weighs words down (github.com/damian0815/compel, its
    mode REMOVE; what it met there, that later tokens change their places, is no matter for T5, which knows
    distances only). Here the same line is followed beyond 1. Measured with the embedded weights: colours and
    sizes are gone at 0 and half gone between 0.2 and 0.4; from 1.6 on shapes suffer.
    """
    plain_LD = vectors_LD.float()
    moved_LD = plain_LD
    for weight in sorted(set(weights) - {1.0}):
        stay = [at for at, one in enumerate(weights) if one != weight]
        without_LD = neutral_D.float().expand_as(plain_LD).clone()
        without_LD[stay] = encode([ids[at] for at in stay]).to(without_LD)
        moved_LD = moved_LD + (weight - 1) * (plain_LD - without_LD)
    return moved_LD.to(vectors_LD.dtype)


# --- Long texts ----------------------------------------------------------------------------------------

_BORDERS = (
    re.compile(r"(?<=[.!?;\u3002\uff01\uff1f])\s+|\n+"),  # sentences
    re.compile(r"(?<=[,\uff0c\u3001:])\s*"),
    re.compile(r"\s+"),
)


def chunks(count: Callable[[str], int], text: str, limit: int) -> list[tuple[int, int]]:
    """Where to cut a text so that no part has more than `limit` tokens: [(start, end), ...] in characters.

    Cut is behind a sentence, else behind a comma, else between words, and in a word when there is nothing
    else; a better border is taken when it leaves a part at least half full. `count`: of tokens.
    """
    found = []
    start = 0
    while start < len(text):
        end = len(text)
        if count(text[start:]) > limit:
            end = start + _longest(count, text[start:], limit)
        found.append((start, end))
        start = end
    return found or [(0, 0)]


def _longest(count: Callable[[str], int], text: str, limit: int) -> int:
    """How many characters of the text to take."""
    for pattern in _BORDERS:
        borders = [one.end() for one in pattern.finditer(text) if 0 < one.end() < len(text)]
        fit = _most(count, text, borders, limit)
        if fit and (count(text[:fit]) >= limit / 2 or pattern is _BORDERS[-1]):
            return fit
    return _most(count, text, range(1, len(text)), limit) or 1


def _most(count: Callable[[str], int], text: str, borders: Sequence[int], limit: int) -> int:
    """The last border up to which there are not too many tokens; 0 when there is none."""
    low, high = 0, len(borders)
    while low < high:
        middle = (low + high) // 2
        if count(text[: borders[middle]]) <= limit:
            low = middle + 1
        else:
            high = middle
    return borders[low - 1] if low else 0
