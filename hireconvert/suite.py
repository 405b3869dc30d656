"""Tasks made from a seed, offline: what is asked, what a right answer is, and prompts to a length.

Every prompt shows solved examples first, so that models of a hundred million parameters can follow
it. Answers take several tokens each: the first one comes out of the prompt's dense pass.
"""

import hashlib
import json
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hireconvert.errors import UsageError
from hireconvert.programs import Program, draw_program, solves
from hireconvert.sandbox import require_programs

__all__ = ["TASKS", "Item", "build_items", "fingerprint", "grade"]

_MIN_EXAMPLES = 3
# Prompts of a task are between this share of the longest and the longest, all scales alike.
_SHORTEST = 1 / 8
# Tokens an answer may be longer than the right one.
_ANSWER_SLACK = 24

_WORD_LIST = """
apple river stone cloud tiger lamp paper music garden window silver forest bridge candle dragon
engine farmer guitar hammer island jacket kettle ladder mirror needle orange pencil rabbit saddle
temple violin walnut yellow anchor basket castle desert eagle flower ginger harbor insect jungle
kitten lemon magnet number ocean pepper quartz rocket spider ticket valley winter button copper
dinner fabric glass honey iron market night oven planet queen rain sugar tower uncle village water
bread chair dance earth fire gold horse judge knife light money north paint queue road shadow table
voice wheel"""
_COLOUR_LIST = """
red blue green black white grey brown pink gold silver dark pale old young small tall quiet loud
happy lazy brave clever gentle hungry"""
_ANIMAL_LIST = """
fox wolf bear deer hare crow owl hawk frog toad lion tiger horse goat sheep cow pig hen duck swan
mouse rat bat cat dog seal whale shark crab snail ant bee moth spider camel zebra"""
_WORDS, _COLOURS, _ANIMALS = _WORD_LIST.split(), _COLOUR_LIST.split(), _ANIMAL_LIST.split()
_NAMES = ["Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ida", "Jack", "Mia"]
_TEXT_FIELDS = ["name", "city", "color", "size"]
_FIELDS = [*_TEXT_FIELDS, "id", "age", "price", "count", "score", "year", "active", "tags"]


@dataclass(frozen=True)
class Item:
    """One question; an answer ends at the first stop.

    `question` is the prompt's last part, after the examples. `expected` is the answer itself, or
    for `python` the source of its tests.
    """

    task: str
    prompt: str
    question: str
    expected: str
    stops: tuple[str, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class _Draft:
    """A question with its answer; drafts of one kind are too alike to be each other's examples."""

    question: str
    answer: str
    expected: str
    kind: str = ""


@dataclass(frozen=True)
class _Room:
    """How many tokens prompt and answer may take together."""

    tokenizer: Any
    budget: int

    def size(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def answer(self, text: str) -> int:
        return self.size(text) + _ANSWER_SLACK


# ------------------------------------------------------------------------------------- questions


def _copy(rng: random.Random) -> _Draft:
    text = " ".join(_sentence(rng) for _ in range(rng.randint(1, 3)))
    return _Draft(f"Text: {text}\nCopy:", f" {text}", text)


def _sentence(rng: random.Random) -> str:
    who, colour, animal = rng.choice(_NAMES), rng.choice(_COLOURS), rng.choice(_ANIMALS)
    first, second = rng.sample(_WORDS, 2)
    return rng.choice(
        [
            f"{who} saw a {colour} {animal} near the {first} and the {second}.",
            f"On day {rng.randint(2, 999)} the {animal} gave {who} a {colour} {first}.",
            f"The {first} of {who} costs {rng.randint(2, 99)} coins, the {second} is {colour}.",
            f"A {colour} {animal} sold the {first} to {who} for a {second}.",
        ]
    )


def _json(rng: random.Random) -> _Draft:
    fields = rng.sample(_FIELDS, rng.randint(2, 4))
    value = {name: _json_value(name, rng) for name in fields}
    right = json.dumps(value)
    return _Draft(f"Broken: {_break_json(right, rng)}\nFixed:", f" {right}", right)


def _json_value(name: str, rng: random.Random) -> Any:
    if name in _TEXT_FIELDS:
        return rng.choice(_NAMES if name == "name" else _WORDS)
    if name == "active":
        return rng.random() < 0.5
    if name == "tags":
        return rng.sample(_WORDS, 2)
    return rng.randint(1, 2030)


def _break_json(right: str, rng: random.Random) -> str:
    def one(pattern: str, replacement: str) -> str:
        found = rng.choice(list(re.finditer(pattern, right)))
        return right[: found.start()] + found.expand(replacement) + right[found.end() :]

    return rng.choice(
        [
            lambda: right[:-1],
            lambda: right[:-1] + ",}",
            lambda: right.replace('"', "'"),
            lambda: one(r', "', ' "'),
            lambda: one(r'"(\w+)":', r"\1:"),
        ]
    )()


def _arithmetic(rng: random.Random) -> _Draft:
    total = rng.randint(2, 12)
    chain, steps = str(total), []
    for _ in range(rng.randint(2, 3)):
        number = rng.randint(1, 9)
        add = total <= number or rng.random() < 0.5
        step = f"{'+' if add else '-'} {number}"
        after = total + number if add else total - number
        chain += f" {step}"
        steps.append(f"{total} {step} = {after}.")
        total = after
    answer = f" {' '.join(steps)} The result is {total}."
    return _Draft(f"Question: What is {chain}?\nAnswer:", answer, str(total))


def _python(rng: random.Random) -> _Draft:
    program: Program = draw_program(rng)
    # The line break is the prompt's: many tokenizers have one token for quotes with it, and to
    # models that have never seen the quotes without, the text ends there.
    header, body = program.header + "\n", program.body.removeprefix("\n")
    return _Draft(header, body, program.tests, program.kind)


# --------------------------------------------------------------------------------------- prompts


def _with_examples(
    draw: Callable[[random.Random], _Draft], rng: random.Random, room: _Room, separator: str
) -> tuple[str, _Draft]:
    """The prompt, filled with examples up to the budget, and what it asks."""
    asked = draw(rng)
    left = room.budget - room.size(asked.question) - room.answer(asked.answer)
    examples: list[str] = []
    while True:
        shown = draw(rng)
        if shown.kind and shown.kind == asked.kind:
            continue
        text = shown.question + shown.answer + separator
        left -= room.size(text)
        if left < 0 and len(examples) >= _MIN_EXAMPLES:
            return "".join(examples) + asked.question, asked
        examples.append(text)


def _with_facts(rng: random.Random, room: _Room) -> tuple[str, _Draft]:
    """Facts up to the budget, two questions with their answers, and a third question."""
    names = [f"{colour} {animal}" for colour in _COLOURS for animal in _ANIMALS]
    rng.shuffle(names)
    facts = [(name, f"{rng.randint(10_000, 99_999)}") for name in names]
    lines = [f"The code of the {name} is {code}.\n" for name, code in facts]
    first = _fact_question(facts[0])
    used = _MIN_EXAMPLES * room.answer(first.question + first.answer)
    count = _MIN_EXAMPLES + 1
    used += sum(room.size(line) for line in lines[:count])
    while count < len(lines) and (used := used + room.size(lines[count])) <= room.budget:
        count += 1
    asked = [_fact_question(fact) for fact in rng.sample(facts[:count], _MIN_EXAMPLES)]
    shown = "".join(draft.question + draft.answer + "\n\n" for draft in asked[:-1])
    return "".join(lines[:count]) + "\n" + shown + asked[-1].question, asked[-1]


def _fact_question(fact: tuple[str, str]) -> _Draft:
    name, code = fact
    return _Draft(
        f"Question: What is the code of the {name}?\nAnswer:",
        f" The code of the {name} is {code}.",
        code,
    )


@dataclass(frozen=True)
class _Task:
    write: Callable[[random.Random, _Room], tuple[str, _Draft]]
    right: Callable[[Item, str], bool]
    stops: tuple[str, ...] = ("\n",)


def _lines(draw: Callable[[random.Random], _Draft]) -> Callable[..., tuple[str, _Draft]]:
    return lambda rng, room: _with_examples(draw, rng, room, "\n\n")


# --------------------------------------------------------------------------------------- grading


def _same_text(item: Item, answer: str) -> bool:
    return answer.strip() == item.expected


def _same_json(item: Item, answer: str) -> bool:
    try:
        return bool(json.loads(answer) == json.loads(item.expected))
    except (ValueError, RecursionError):
        return False


def _found(pattern: str) -> Callable[[Item, str], bool]:
    def right(item: Item, answer: str) -> bool:
        found = re.search(pattern, answer)
        return found is not None and found[1] == item.expected

    return right


_TASKS = {
    "copy": _Task(_lines(_copy), _same_text),
    "retrieval": _Task(_with_facts, _found(r"\b(\d{5})\b")),
    "json": _Task(_lines(_json), _same_json),
    "arithmetic": _Task(_lines(_arithmetic), _found(r"result is (-?\d+)")),
    "python": _Task(
        lambda rng, room: _with_examples(_python, rng, room, "\n\n\n"),
        lambda item, answer: solves(item.question + answer, item.expected),
        ("\n\n\n", "\ndef ", "\nclass ", "\n#", "\nprint", "\nassert", "\nif "),
    ),
}
TASKS = tuple(_TASKS)


def build_items(
    task: str, tokenizer: Any, *, num_items: int, max_length: int, seed: int = 0
) -> list[Item]:
    """The task's first `num_items` items for a seed, prompt and answer within `max_length` tokens.

    Item i is the same whatever the number of items. Raises UsageError when a prompt with few
    examples is longer than `max_length`, InputError where the programs of `python` cannot run.
    """
    if task == "python":
        require_programs()
    return [_build(task, tokenizer, f"{task} {seed} {i}", max_length) for i in range(num_items)]


def _build(task: str, tokenizer: Any, seed: str, max_length: int) -> Item:
    share = math.exp(random.Random(seed).uniform(math.log(_SHORTEST), 0))
    budget = round(max_length * share)
    while True:
        room = _Room(tokenizer, budget)
        prompt, asked = _TASKS[task].write(random.Random(seed), room)
        new_tokens = room.answer(asked.answer)
        needed = room.size(prompt) + new_tokens
        if needed <= max_length:
            stops = _TASKS[task].stops
            return Item(task, prompt, asked.question, asked.expected, stops, new_tokens)
        if budget <= 0:
            raise UsageError(
                f"task '{task}' needs {needed} tokens for an item, but the longest allowed is "
                f"{max_length}; allow longer ones."
            )
        # Either there is no room for the fewest examples, or joined parts took more tokens.
        budget -= needed - max_length


def grade(item: Item, answer: str) -> bool:
    """Whether an answer, cut at its first stop, is right; Python runs in a sandboxed process."""
    return _TASKS[item.task].right(item, answer)


def fingerprint(items: Sequence[Any]) -> str:
    """The SHA-256 of items of any kind: the same for the same questions in the same order."""
    return hashlib.sha256(repr(list(items)).encode()).hexdigest()
