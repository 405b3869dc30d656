"""Small Python functions to complete: header, body, and tests that decide in a sandbox.

Texts hold {a} and {b} (numbers) and {c} (a letter), drawn anew for each program.
"""

import random
from dataclasses import dataclass

from hireconvert.sandbox import run_python

_INTEGERS = "(0,), (1,), (12,), (35,), (60,), (91,), (-7,)"
_PAIRS = "(2, 3), (0, 5), (7, 7), (-4, 9)"
_LISTS = "([],), ([1, 2, 3],), ([40, 7, 9, 25, 3, 8],), ([5, 5, -6, 70, 11, 12, 13],)"
_FILLED = "([4],), ([1, 2, 3],), ([40, 7, 9, 25, 3, 8],), ([-5, -6],)"
_TEXTS = "('',), ('a',), ('banana',), ('The quick brown fox',), ('xylophone music',)"
_WORDS = "([],), (['one'],), (['red', 'green', 'blue'],)"

# name: (parameters, what the function returns, its expression, argument tuples of the tests)
_KINDS = {
    "scale": ("x", "x multiplied by {a}, plus {b}", "x * {a} + {b}", _INTEGERS),
    "shift": ("x", "x minus {a}", "x - {a}", _INTEGERS),
    "area": ("width, height", "width times height, plus {a}", "width * height + {a}", _PAIRS),
    "divisible": ("n", "True if n is divisible by {a}, else False", "n % {a} == 0", _INTEGERS),
    "remainder": ("n", "the remainder of n divided by {a}", "n % {a}", _INTEGERS),
    "larger": ("x, y", "the larger of x and y, times {a}", "max(x, y) * {a}", _PAIRS),
    "at_most": ("x", "x, but at most {b}", "min(x, {b})", _INTEGERS),
    "total": ("numbers", "the sum of the numbers, plus {a}", "sum(numbers) + {a}", _LISTS),
    "largest": ("numbers", "the largest number, minus {a}", "max(numbers) - {a}", _FILLED),
    "above": (
        "numbers",
        "a list of the numbers greater than {b}",
        "[n for n in numbers if n > {b}]",
        _LISTS,
    ),
    "count_above": (
        "numbers",
        "how many numbers are greater than {b}",
        "sum(1 for n in numbers if n > {b})",
        _LISTS,
    ),
    "times_each": (
        "numbers",
        "a list of the numbers, each multiplied by {a}",
        "[n * {a} for n in numbers]",
        _LISTS,
    ),
    "first_items": ("items", "the first {a} items", "items[:{a}]", _LISTS),
    "every_other": ("items", "every {a}th item, starting with the first", "items[::{a}]", _LISTS),
    "repeat": ("text", "the text repeated {a} times", "text * {a}", _TEXTS),
    "count_letter": ("text", "how often '{c}' occurs in text", "text.count('{c}')", _TEXTS),
    "starts": (
        "text",
        "True if text starts with '{c}', else False",
        "text.startswith('{c}')",
        _TEXTS,
    ),
    "without": ("text", "the text with every '{c}' removed", "text.replace('{c}', '')", _TEXTS),
    "upper_after": (
        "text",
        "'{c}' followed by the text in upper case",
        "'{c}' + text.upper()",
        _TEXTS,
    ),
    "joined": ("words", "the words joined by '{c}'", "'{c}'.join(words)", _WORDS),
    "lengths": (
        "words",
        "a list of the lengths of the words, each plus {a}",
        "[len(word) + {a} for word in words]",
        _WORDS,
    ),
}


@dataclass(frozen=True)
class Program:
    """A function cut after its docstring, the body that follows, and the source of its tests."""

    kind: str
    header: str
    body: str
    tests: str


def draw_program(rng: random.Random) -> Program:
    """A random program; its name tells the constants, so that many fit into one file."""
    kind = rng.choice(list(_KINDS))
    parameters, returns, expression, cases = _KINDS[kind]
    constants = {"a": rng.randint(2, 9), "b": rng.randint(3, 50), "c": rng.choice("abeinorstx")}
    returns, expression = (text.format(**constants) for text in (returns, expression))
    name = "_".join([kind, *(str(value) for value in constants.values())])
    header = f'def {name}({parameters}):\n    """Return {returns}."""'
    tests = (
        f"for arguments in [{cases}]:\n"
        f"    expected = (lambda {parameters}: {expression})(*arguments)\n"
        f"    found = {name}(*arguments)\n"
        "    assert found == expected and type(found) is type(expected), (arguments, found)\n"
    )
    return Program(kind, header, f"\n    return {expression}", tests)


def solves(source: str, tests: str) -> bool:
    """Whether the source runs and passes its tests, in a process of its own under limits."""
    return run_python(f"{source}\n\n\n{tests}").status == "finished"
