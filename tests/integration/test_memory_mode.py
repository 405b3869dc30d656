"""Load mode `inference`: what is dropped, that it comes back, and what is never dropped."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from hireconvert.runtime import hire_memory
from tests.tiny import base_of, hire_model, tiny_model, tokens

pytestmark = pytest.mark.skipif(
    not hire_memory._MAPPINGS.exists(), reason="this system does not list its mappings"
)
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 8}
FFN = {"keep_fraction": 0.4, "keep": "candidates", "unselected": {}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    hire_model(tiny_model("llama"), ffn=FFN, head={"certified": True}).save_pretrained(tmp_path)
    return tmp_path


def loaded(folder: Path, **options: Any) -> Any:
    kind = type(hire_model(tiny_model("llama"), ffn=FFN))
    return kind.from_pretrained(folder, **options).eval()


def resident(folder: Path) -> int:
    """Bytes of the folder's files that this process has mapped and in memory."""
    total, ours = 0, False
    for line in hire_memory._MAPPINGS.read_text().splitlines():
        if " kB" not in line:
            ours = str(folder) in line
        elif ours and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


def test_pages_are_dropped_and_come_back(folder: Path) -> None:
    model = loaded(folder)
    expected = model.generate(tokens(1, 9), **GREEDY)
    before = resident(folder)
    assert before > 0
    mapped = model.hire_release()
    assert mapped >= before and resident(folder) == 0
    assert torch.equal(model.generate(tokens(1, 9), **GREEDY), expected)
    assert resident(folder) > 0


def test_every_prompt_is_followed_by_a_release(folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv(hire_memory.VARIABLE, "inference")
    model, sizes = loaded(folder), []
    release = model.hire_release
    model.hire_release = lambda: sizes.append(release())
    first = model.generate(tokens(1, 9), **GREEDY)
    second = model.generate(first, **GREEDY)
    assert len(sizes) == 2 and min(sizes) > 0
    model.set_hire_memory("keep_dense")
    assert torch.equal(model.generate(first, **GREEDY), second)
    assert len(sizes) == 2


def test_rows_of_copies_are_what_is_left_of_the_ffn(tmp_path: Path) -> None:
    copies = {"keep_fraction": 1.0, "predictor": {}, "unselected": {}, "rows": "copies"}
    hire_model(tiny_model("llama"), ffn=copies, head={"certified": True}).save_pretrained(tmp_path)
    model = loaded(tmp_path, dtype=torch.float32)
    expected = model.generate(tokens(1, 9), **GREEDY)
    assert model.hire_release() > 0 and resident(tmp_path) == 0
    for layer in base_of(model).hire_layers.values():
        held = sum(tensor.nbytes for tensor in layer.prepared.native.tensors.values())
        weights = sum(part.module.weight.numel() for part in layer.parts.matrices())
        vectors = 4 * (4 * 96 + 3 * 32)  # biases, norms and units by neuron; inputs and units
        assert held <= weights * (4 + 16 / 8 + 1) / 8 + vectors
    assert torch.equal(model.generate(tokens(1, 9), **GREEDY), expected)


def test_what_was_written_to_stays(folder: Path) -> None:
    model = loaded(folder)
    weight = base_of(model).layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight.mul_(2.0)
    expected = weight.clone()
    kept = resident(folder)
    model.hire_release()  # the predictors' file was not written to
    assert 0 < resident(folder) < kept
    assert torch.equal(weight, expected)


def test_saving_after_a_release_gives_the_same_file(folder: Path, tmp_path: Path) -> None:
    model, again = loaded(folder, dtype=torch.float32), tmp_path / "again"
    assert model.hire_release() > 0
    model.save_pretrained(again)
    name = "model.safetensors"
    assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_weights_from_nowhere_are_said_to_stay(caplog: Any) -> None:
    model = hire_model(tiny_model("llama"), ffn=FFN)
    with caplog.at_level(logging.WARNING, logger="hire"):
        assert model.hire_release() == 0 and model.hire_release() == 0
    assert caplog.text.count("nothing is released") == 1


def test_another_mode_is_refused(folder: Path, monkeypatch: Any) -> None:
    with pytest.raises(ValueError, match="mode is 'small', expected one of"):
        loaded(folder).set_hire_memory("small")
    monkeypatch.setenv(hire_memory.VARIABLE, "small")
    with pytest.raises(ValueError, match="HIRE_MEMORY is 'small', expected one of"):
        loaded(folder)
