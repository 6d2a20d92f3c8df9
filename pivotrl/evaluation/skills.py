"""Out-of-domain skills for tiny policies: what agentic training might make a policy forget.

A warm-up mixes in examples of split "train"; evaluation asks those of split "heldout". A prompt belongs to exactly one split, by
its hash, so the two never meet whatever their seeds and counts.
"""

import hashlib
import random
from collections.abc import Callable
from typing import Literal

from pivotrl.types import Message, Record

WORDS = "apple bread chair door eagle field green house island juice king lemon moon night ocean paper queen river stone tree".split()
LETTERS = "abcdefghij"
HELDOUT_ONE_IN = 5


class SkillExample(Record):
    """A short question with exactly one right answer."""

    family: str
    prompt: str
    answer: str


def _add(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    return f"add: {a} {b}", str(a + b)


def _copy(rng: random.Random) -> tuple[str, str]:
    words = " ".join(rng.choices(WORDS, k=3))
    return f"copy: {words}", words


def _reverse(rng: random.Random) -> tuple[str, str]:
    digits = "".join(rng.choices("0123456789", k=4))
    return f"reverse: {digits}", digits[::-1]


def _sort(rng: random.Random) -> tuple[str, str]:
    digits = rng.choices("0123456789", k=4)
    return f"sort: {''.join(digits)}", "".join(sorted(digits))


def _lookup(rng: random.Random) -> tuple[str, str]:
    keys = rng.sample(LETTERS, k=3)
    values = rng.choices("0123456789", k=3)
    chosen = rng.randrange(3)
    pairs = " ".join(f"{key}={value}" for key, value in zip(keys, values, strict=True))
    return f"lookup: {pairs}; {keys[chosen]}", values[chosen]


def _count(rng: random.Random) -> tuple[str, str]:
    digits = "".join(rng.choices("123", k=rng.randint(5, 8)))
    wanted = rng.choice("123")
    return f"count {wanted}: {digits}", str(digits.count(wanted))


def _compare(rng: random.Random) -> tuple[str, str]:
    a, b = rng.sample(range(100, 1000), k=2)
    return f"larger: {a} {b}", str(max(a, b))


def _next(rng: random.Random) -> tuple[str, str]:
    start, step = rng.randint(1, 80), rng.randint(1, 9)
    return f"next: {start} {start + step} {start + 2 * step}", str(start + 3 * step)


def _upper(rng: random.Random) -> tuple[str, str]:
    words = " ".join(rng.choices(WORDS, k=3))
    return f"upper: {words}", words.upper()


def _last(rng: random.Random) -> tuple[str, str]:
    words = rng.choices(WORDS, k=4)
    return f"last: {' '.join(words)}", words[-1]


FAMILIES: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "add": _add,
    "compare": _compare,
    "copy": _copy,
    "count": _count,
    "last": _last,
    "lookup": _lookup,
    "next": _next,
    "reverse": _reverse,
    "sort": _sort,
    "upper": _upper,
}


def generate(family: str, count: int, *, seed: int, split: Literal["train", "heldout"]) -> list[SkillExample]:
    """`count` examples, the same for the same arguments; a prompt may come twice.

    Raises:
        ValueError: unknown family or split; lists the known ones.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown skill family {family!r}; known: {', '.join(FAMILIES)}")
    if split not in ("train", "heldout"):
        raise ValueError(f"unknown split {split!r}; known: train, heldout")
    rng = random.Random(f"{family}/{split}/{seed}")
    examples: list[SkillExample] = []
    while len(examples) < count:
        prompt, answer = FAMILIES[family](rng)
        if _is_heldout(prompt) == (split == "heldout"):
            examples.append(SkillExample(family=family, prompt=prompt, answer=answer))
    return examples


def _is_heldout(prompt: str) -> bool:
    return hashlib.sha256(prompt.encode()).digest()[0] % HELDOUT_ONE_IN == 0


def to_messages(example: SkillExample) -> list[Message]:
    """The example as a conversation of one question and its right answer."""
    return [Message(role="user", content=example.prompt), Message(role="assistant", content=example.answer)]


def score(example: SkillExample, text: str) -> float:
    """1.0 when a completion's text is the answer exactly, whitespace around it aside; else 0.0."""
    return float(text.strip() == example.answer)
