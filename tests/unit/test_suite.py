"""Generated tasks: items to a token budget, graders that tell right from wrong."""

import json
import random

import pytest

from hireconvert.errors import UsageError
from hireconvert.programs import draw_program, solves
from hireconvert.suite import TASKS, Item, build_items, fingerprint, grade
from tests.tiny_files import tiny_tokenizer

TOKENIZER = tiny_tokenizer()  # a token a byte
LENGTH = 4096


def items(task: str, count: int = 12, **changes: int) -> list[Item]:
    return build_items(task, TOKENIZER, **{"num_items": count, "max_length": LENGTH, **changes})


def answers(item: Item) -> tuple[str, str]:
    """A right answer, and the least wrong one."""
    if item.task == "retrieval":
        return f" The code is {item.expected}.", f" The code is {int(item.expected) + 1}."
    if item.task == "arithmetic":
        return f" so the result is {item.expected}.", f" result is {int(item.expected) + 1}."
    if item.task == "json":
        value = json.loads(item.expected)
        changed = {**value, next(iter(value)): "changed"}
        return json.dumps(value, indent=1), json.dumps(changed)
    if item.task == "copy":
        return f" {item.expected} ", f" {item.expected[:-1]}"
    body = item.expected.split(": ", 2)[1].split(")(*arguments)")[0]
    return f"\n    return {body}", "\n    return 12345"


@pytest.mark.parametrize("task", [task for task in TASKS if task != "python"])
def test_graders_tell_right_from_wrong(task: str) -> None:
    for item in items(task):
        right, wrong = answers(item)
        assert grade(item, right) and not grade(item, wrong) and not grade(item, "")


@pytest.mark.parametrize("seed", range(4))
def test_programs_pass_their_own_tests_and_others_do_not(seed: int) -> None:
    program = draw_program(random.Random(seed))
    assert solves(program.header + program.body, program.tests)
    assert not solves(program.header + "\n    return None", program.tests)
    assert not solves(program.header + "\n    return (", program.tests)
    assert not solves(program.header + "\n    raise SystemExit(0)", program.tests)


def test_a_python_item_is_graded_by_running_it() -> None:
    item = items("python", 1)[0]
    assert item.prompt.endswith('"""\n')  # quotes and line break may be one token
    assert not grade(item, "\n    pass")
    solution = item.expected.split("lambda ")[1].split(": ", 1)[1].split(")(*arguments)")[0]
    assert grade(item, f"\n    return {solution}")


@pytest.mark.parametrize("task", TASKS)
def test_prompts_and_answers_stay_within_the_budget_at_all_scales(task: str) -> None:
    found = items(task, 24)
    sizes = [len(TOKENIZER(item.prompt).input_ids) + item.max_new_tokens for item in found]
    assert max(sizes) <= LENGTH and max(sizes) > LENGTH / 2 and min(sizes) < LENGTH / 3
    for item in found:
        assert item.prompt.endswith(item.question)
        shown = item.prompt.removesuffix(item.question)
        assert item.expected not in shown or task == "retrieval" or task == "arithmetic"


@pytest.mark.parametrize("task", TASKS)
def test_the_seed_makes_the_items(task: str) -> None:
    assert items(task, 6)[:3] == items(task, 3)
    assert len({item.prompt for item in items(task, 6)}) == 6
    assert fingerprint(items(task, 3)) == fingerprint(items(task, 3))
    assert fingerprint(items(task, 3)) != fingerprint(items(task, 3, seed=1))


def test_broken_json_really_is_broken() -> None:
    for item in items("json", 40):
        broken = item.question.removeprefix("Broken: ").removesuffix("\nFixed:")
        with pytest.raises(ValueError):
            json.loads(broken)


def test_the_code_asked_for_is_among_the_facts() -> None:
    for item in items("retrieval"):
        name = item.question.split("the code of ")[1].split("?")[0]
        assert f"The code of {name} is {item.expected}.\n" in item.prompt


def test_a_budget_without_room_for_the_fewest_examples_is_refused() -> None:
    with pytest.raises(UsageError, match=r"task 'json' needs \d+ tokens"):
        items("json", 1, max_length=200)
