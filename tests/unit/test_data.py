"""Tokens: reading documents, packing, held-out split, evaluation windows, sampling, storage."""

import gzip
import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hireconvert import documents
from hireconvert.data import (
    TokenData,
    build_tokens,
    evaluation_windows,
    load_tokens,
    read_documents,
    save_tokens,
    training_tokens,
)
from hireconvert.errors import HubError, InputError
from hireconvert.recipe import DataRecipe
from hireconvert.sampling import adds_bos, sample_from_model

BOS, EOS = 0, 1
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def byte_tokenizer(bos=True, template=None):
    """One token per byte: id = rank of the byte's letter + 2, after <s> and </s>."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": BOS, "</s>": EOS} | {one: n + 2 for n, one in enumerate(letters)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if bos:
        core.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", BOS)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


def recipe(source, fit=64, held=32, window=16, **more):
    return DataRecipe(
        source=str(source), num_tokens=fit, num_held_tokens=held, window=window, **more
    )


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def text_of(tokenizer, ids_WT):
    return tokenizer.decode(ids_WT[:, 1:].flatten().tolist())


# ---------------------------------------------------------------------------------------- packing


def test_adds_bos(tokenizer):
    assert adds_bos(tokenizer)
    assert not adds_bos(byte_tokenizer(bos=False))


def test_windows_are_packed_seeded_and_from_different_documents(tmp_path, tokenizer):
    pieces = [f"{letter * 30}" for letter in "abcdefgh"]
    path = write(tmp_path / "x.txt", "\n\n\n".join(pieces))
    tokens = build_tokens(recipe(path), tokenizer, seed=0)
    assert tokens.fit_WT.shape == (4, 16) and tokens.held_WT.shape == (2, 16)
    assert tokens.fit_WT.dtype == torch.int64
    assert (tokens.fit_WT[:, 0] == BOS).all() and (tokens.held_WT[:, 0] == BOS).all()
    assert tokens.source == "x.txt" and tokens.starts_with_bos
    fit, held = text_of(tokenizer, tokens.fit_WT), text_of(tokenizer, tokens.held_WT)
    assert not (set(fit) & set(held)) - {"\n"}
    # A window's worth (15 new tokens) of each document, then a blank line.
    assert fit[15:17] == "\n\n" and len(set(fit[:15])) == 1 and fit[17] != fit[0]
    assert tokens.num_documents == len((set(fit) | set(held)) - {"\n"}) == 6
    again = build_tokens(recipe(path), tokenizer, seed=0)
    other = build_tokens(recipe(path), tokenizer, seed=1)
    assert torch.equal(again.fit_WT, tokens.fit_WT) and again.text_sha256 == tokens.text_sha256
    assert not torch.equal(other.fit_WT, tokens.fit_WT)
    assert other.text_sha256 != tokens.text_sha256


def test_no_bos_no_column_for_it(tmp_path):
    path = write(tmp_path / "x.txt", "\n\n\n".join(letter * 40 for letter in "abcdef"))
    tokens = build_tokens(recipe(path), byte_tokenizer(bos=False), seed=0)
    assert tokens.fit_WT.shape == (4, 16) and not tokens.starts_with_bos
    assert not (tokens.fit_WT == BOS).any()


@pytest.mark.parametrize("seed", range(4))
def test_a_long_document_is_not_spent_on_the_held_out_side(tmp_path, tokenizer, seed):
    path = write(tmp_path / "x.txt", "a" * 500 + "\n\n\n" + "b" * 40)
    tokens = build_tokens(recipe(path), tokenizer, seed=seed)
    assert set(text_of(tokenizer, tokens.fit_WT)) == {"a"}
    assert set(text_of(tokenizer, tokens.held_WT)) <= {"b", "\n"}


def test_one_document_gives_disjoint_parts(tmp_path, tokenizer):
    words = "".join(f"{number:04d}" for number in range(60))
    path = write(tmp_path / "x.txt", words)
    tokens = build_tokens(recipe(path), tokenizer, seed=0)
    fit, held = text_of(tokenizer, tokens.fit_WT), text_of(tokenizer, tokens.held_WT)
    assert words.startswith(fit)
    assert (words + "\n\n").endswith(held)
    assert len(fit) + len(held) <= len(words) + 2


def test_too_little_text_names_what_there_is_and_the_minimum(tmp_path, tokenizer):
    path = write(tmp_path / "x.txt", "a" * 20 + "\n\n\n" + "b" * 20)
    with pytest.raises(InputError, match=r"x\.txt: too little text: 44 tokens .* minimum is 90"):
        build_tokens(recipe(path), tokenizer, seed=0)


def test_tokens_are_rounded_up_to_whole_windows(tmp_path, tokenizer):
    path = write(tmp_path / "x.txt", "\n\n\n".join(letter * 40 for letter in "abcdef"))
    tokens = build_tokens(recipe(path, fit=33, held=17), tokenizer, seed=0)
    assert len(tokens.fit_WT) == 3 and len(tokens.held_WT) == 2


def test_self_asks_the_sampler_and_reports_progress(tokenizer):
    asked, seen = [], []

    def sample(num_tokens, seed):
        asked.append((num_tokens, seed))
        return torch.arange(2, 202).view(10, 20)

    tokens = build_tokens(
        recipe("self"), tokenizer, seed=5, sample=sample, progress=lambda *now: seen.append(now)
    )
    assert asked == [(90, 5)] and tokens.source == "self"
    new = {*tokens.fit_WT[:, 1:].flatten().tolist()}, {*tokens.held_WT[:, 1:].flatten().tolist()}
    assert len(new[0]) == 60 and len(new[1]) == 30 and not new[0] & new[1]
    assert seen[-1] == (90, 90) and seen == sorted(seen)


def test_training_text_leaves_out_held_documents_and_takes_spans(tmp_path, tokenizer):
    """Letters tell documents apart; digits tell where in its document a span begins."""
    bodies = {one: "".join(f"{one}{n}" for n in range(10)) for one in "abcdefghijkl"}
    path = write(tmp_path / "x.txt", "\n\n\n".join(bodies.values()))
    calibration = build_tokens(recipe(path), tokenizer, seed=0)
    held = set(text_of(tokenizer, calibration.held_WT)) & set(bodies)
    assert held and set(calibration.held_from.values()) == {0}
    wanted = recipe(path, fit=5 * 16, held=16)
    tokens = training_tokens(wanted, tokenizer, calibration.held_from, seed=0)
    text = text_of(tokenizer, tokens.fit_WT)
    assert tokens.fit_WT.shape == (5, 16) and tokens.held_WT.shape == (0, 16)
    assert (tokens.fit_WT[:, 0] == BOS).all()
    assert not set(text) & held and tokens.num_documents == len(set(text) & set(bodies)) == 5
    assert len({part[:2] for part in text.split("\n\n")}) > 1  # not the beginnings alone
    again = training_tokens(wanted, tokenizer, calibration.held_from, seed=0)
    other = training_tokens(wanted, tokenizer, calibration.held_from, seed=1)
    assert torch.equal(again.fit_WT, tokens.fit_WT) and again.text_sha256 == tokens.text_sha256
    assert not torch.equal(other.fit_WT, tokens.fit_WT)


def test_training_text_takes_whole_documents_when_spans_are_too_little(tmp_path, tokenizer):
    path = write(tmp_path / "x.txt", "\n\n\n".join(letter * 60 for letter in "abcdef"))
    calibration = build_tokens(recipe(path), tokenizer, seed=0)
    held = set(text_of(tokenizer, calibration.held_WT)) - {"\n"}
    wanted = recipe(path, fit=12 * 16, held=16)
    tokens = training_tokens(wanted, tokenizer, calibration.held_from, seed=0)
    text = text_of(tokenizer, tokens.fit_WT)
    assert len(text) == 12 * 15 and not set(text) & held
    too_much = recipe(path, fit=400, held=16)
    message = r"x\.txt: too little text: \d+ tokens in \d documents without .* minimum is 375"
    with pytest.raises(InputError, match=message):
        training_tokens(too_much, tokenizer, calibration.held_from, seed=0)


def test_training_text_of_a_cut_document_ends_where_the_held_out_part_begins(tmp_path, tokenizer):
    words = "".join(f"{number:04d}" for number in range(60))
    path = write(tmp_path / "x.txt", words)
    calibration = build_tokens(recipe(path), tokenizer, seed=0)
    held = text_of(tokenizer, calibration.held_WT)
    (start,) = calibration.held_from.values()
    assert (words + "\n\n")[start:] == held
    wanted = recipe(path, fit=14 * 16, held=16)
    tokens = training_tokens(wanted, tokenizer, calibration.held_from, seed=0)
    windows = {text_of(tokenizer, window_T[None]) for window_T in tokens.fit_WT}
    assert windows == {words[place : place + 15] for place in range(0, 14 * 15, 15)}
    with pytest.raises(InputError, match=rf"{start} tokens in 1 documents"):
        training_tokens(
            recipe(path, fit=15 * 16, held=16), tokenizer, calibration.held_from, seed=0
        )


def test_training_text_of_the_model_itself_is_sampled_anew(tokenizer):
    asked = []

    def sample(num_tokens, seed):
        asked.append((num_tokens, seed))
        return torch.arange(2, 202).view(10, 20)

    calibration = build_tokens(recipe("self"), tokenizer, seed=5, sample=sample)
    tokens = training_tokens(
        recipe("self"), tokenizer, calibration.held_from, seed=5, sample=sample
    )
    assert asked == [(90, 5), (60, 6)] and tokens.source == "self"
    new = {*tokens.fit_WT[:, 1:].flatten().tolist()}
    assert not new & {*calibration.held_WT[:, 1:].flatten().tolist()}


# -------------------------------------------------------------------------------------- documents


def test_plain_text_is_split_at_two_blank_lines(tmp_path):
    path = write(tmp_path / "x.txt", "\ufeffone\n\nstill one\n\n\n  two\n \n\n\n\n\n\nthree\n")
    assert list(read_documents(path)) == ["one\n\nstill one", "  two", "three"]


def test_json_lines_plain_gzipped_parquet_and_a_folder(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"text": "one", "n": 1}, {"text": " \n"}, {"text": "zwö"}]
    lines = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    write(tmp_path / "a.jsonl", lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "sub").mkdir()
    table = pyarrow.table({"text": ["three"], "n": [3]})
    pyarrow.parquet.write_table(table, tmp_path / "sub" / "c.parquet")
    write(tmp_path / "README.md", "not data")
    write(tmp_path / ".hidden.txt", "not data")
    assert list(read_documents(tmp_path / "a.jsonl")) == ["one", "zwö"]
    assert list(read_documents(tmp_path / "b.jsonl.gz")) == ["one", "zwö"]
    assert list(read_documents(tmp_path / "sub" / "c.parquet")) == ["three"]
    assert list(read_documents(tmp_path)) == ["one", "zwö", "one", "zwö", "three"]


def test_chat_column_goes_through_the_template(tmp_path):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path = write(tmp_path / "x.jsonl", json.dumps({"chat": messages}))
    assert list(read_documents(path, "text", "chat", byte_tokenizer(template=CHAT))) == [
        "<user>hi<assistant>ho"
    ]


BAD_FILES = {
    "empty": ("x.txt", b"", "the file is empty"),
    "blank": ("x.txt", b"\n \n", "no text in it"),
    "latin-1": ("x.txt", "größer".encode("latin-1"), r"not UTF-8 text \(byte 2\)"),
    "extension": ("x.pdf", b"text", "unknown kind of file; expected .txt, .jsonl"),
    "json": ("x.jsonl", b'{"text": "a"}\n\n{"text": \n', "x.jsonl, line 3: not valid JSON"),
    "json utf-8": ("x.jsonl", b'{"text": "\xff"}', "line 1: not UTF-8 text"),
    "not an object": ("x.jsonl", b"[1]", "line 1: expected a JSON object, found list"),
    "column": ("x.jsonl", b'{"a": 1, "b": 2}', "no column 'text'; the columns are: a, b"),
    "not text": ("x.jsonl", b'{"text": 3}', "line 1: column 'text' holds int, expected text"),
    "null": ("x.jsonl", b'{"text": null}', "column 'text' holds NoneType"),
    "gzip": ("x.jsonl.gz", b"not gzip", "cannot be read beyond line 0"),
    "cut gzip": ("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9)[:-9], "cannot be read beyond"),
    "parquet": ("x.parquet", b"PAR1 but not really", "not a readable parquet file"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file(tmp_path, case):
    name, content, message = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        list(read_documents(tmp_path / name))
    assert name in str(caught.value)


def test_missing_source_and_empty_folder(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        list(read_documents(tmp_path / "none.txt"))
    with pytest.raises(InputError, match=r"the folder holds no \.txt"):
        list(read_documents(tmp_path))


def test_missing_parquet_column(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"a": [1], "b": [2]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="row 1: there is no column 'text'; the columns are: a, b"):
        list(read_documents(tmp_path / "x.parquet"))


@pytest.mark.parametrize(
    ("value", "template", "message"),
    [
        ([{"role": "user", "content": "a"}], None, "the tokenizer has no chat template"),
        ("hello", CHAT, "expected chat messages"),
        ([{"from": "user", "value": "a"}], CHAT, "expected chat messages"),
        ([{"role": "x", "content": ""}], "{{ raise_exception('roles') }}", "refuses .* roles"),
    ],
)
def test_bad_chat(tmp_path, value, template, message):
    path = write(tmp_path / "x.jsonl", json.dumps({"chat": value}))
    with pytest.raises(InputError, match=message):
        list(read_documents(path, "text", "chat", byte_tokenizer(template=template)))


def test_chat_column_of_plain_text(tmp_path):
    path = write(tmp_path / "x.txt", "hello")
    with pytest.raises(InputError, match="plain text has no chat column 'chat'"):
        list(read_documents(path, "text", "chat", byte_tokenizer(template=CHAT)))


# -------------------------------------------------------------------------------------------- Hub


class Stream:
    def __init__(self, rows):
        self.rows = rows

    def shuffle(self, **_):
        return self

    def __iter__(self):
        for row in self.rows:
            if isinstance(row, Exception):
                raise row
            yield row


def hub(monkeypatch, tmp_path, result):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(*where, **how):
        calls.append((where, how))
        if isinstance(result, Exception):
            raise result
        return Stream(result)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_hub_dataset_is_streamed(monkeypatch, tmp_path, tokenizer):
    calls = hub(monkeypatch, tmp_path, [{"body": letter * 40} for letter in "abcdef"])
    made = recipe("hub:org/name", config="en", revision="abc", text_column="body")
    tokens = build_tokens(made, tokenizer, seed=0)
    how = {"split": "train", "revision": "abc", "streaming": True}
    assert calls == [(("org/name", "en"), how)]
    assert tokens.source == "hub:org/name@abc"
    assert text_of(tokenizer, tokens.held_WT).startswith("a" * 15 + "\n\n" + "b" * 13)


def test_hub_failures(monkeypatch, tmp_path, tokenizer):
    made = recipe("hub:org/name")
    hub(monkeypatch, tmp_path, ConnectionError("no route"))
    with pytest.raises(HubError, match="hub:org/name: the dataset cannot be opened: no route"):
        build_tokens(made, tokenizer, seed=0)
    hub(monkeypatch, tmp_path, [{"text": "a"}, OSError("reset")])
    with pytest.raises(HubError, match="row 2: reading failed: reset"):
        build_tokens(made, tokenizer, seed=0)
    hub(monkeypatch, tmp_path, [{"body": "a"}])
    with pytest.raises(InputError, match="row 1: there is no column 'text'; the columns are: body"):
        build_tokens(made, tokenizer, seed=0)


# ------------------------------------------------------------------------------------- evaluation


def test_evaluation_windows_of_new_tokens(tokenizer):
    text = "a" * 20 + "\n\n\n\n" + "b" * 20
    windows = evaluation_windows(text, tokenizer, window=16)
    assert windows.ids_WT.shape == (2, 17)
    assert (windows.ids_WT[:, 0] == BOS).all()
    assert windows.num_scored == 32
    assert text_of(tokenizer, windows.ids_WT) == ("a" * 20 + "\n\n" + "b" * 20)[:32]
    same = evaluation_windows(text.replace("\n\n\n\n", "\n\n\n"), tokenizer, window=16)
    assert same.sha256 == windows.sha256


def test_evaluation_windows_without_bos_do_not_score_their_first_token():
    windows = evaluation_windows("a" * 40, byte_tokenizer(bos=False), window=16)
    assert windows.ids_WT.shape == (2, 16) and windows.num_scored == 30


def test_evaluation_windows_limit(tokenizer):
    assert evaluation_windows("a" * 99, tokenizer, num_tokens=40, window=16).num_scored == 32
    assert evaluation_windows("a" * 99, tokenizer, num_tokens=9, window=16).ids_WT.shape == (1, 10)
    with pytest.raises(InputError, match="has 9 tokens; expected one window of at least 16"):
        evaluation_windows("a" * 9, tokenizer, window=16)


# --------------------------------------------------------------------------------------- sampling


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,  # two rows beyond the tokenizer
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("bos", [True, False])
def test_sampling_is_seeded_whole_and_free_of_special_tokens(model, bos):
    tokenizer = byte_tokenizer(bos=bos)
    seen = []
    rows = sample_from_model(
        model, tokenizer, 200, seed=1, window=20, batch=4, progress=lambda *now: seen.append(now)
    )
    assert rows.shape == (10, 20) and rows.dtype == torch.int64
    assert rows.min() >= 2 and rows.max() < 258
    assert len(set(map(tuple, rows.tolist()))) == 10
    assert seen[-1] == (200, 200) and seen == sorted(seen)
    again = sample_from_model(model, tokenizer, 200, seed=1, window=20, batch=4)
    other = sample_from_model(model, tokenizer, 200, seed=2, window=20, batch=4)
    assert torch.equal(rows, again) and not torch.equal(rows, other)
    assert sample_from_model(model, tokenizer, 40, seed=1, window=20, batch=4).shape == (4, 10)


@pytest.mark.parametrize("bos", [True, False])
def test_a_document_that_ends_becomes_a_blank_line_and_cannot_end_at_once(model, bos, monkeypatch):
    tokenizer = byte_tokenizer(bos=bos)
    forward = model.forward

    def eager_to_end(**inputs):
        out = forward(**inputs)
        out.logits[..., EOS] += 1000.0
        return out

    monkeypatch.setattr(model, "forward", eager_to_end)
    rows = sample_from_model(model, tokenizer, 24, seed=1, window=12, batch=2)
    newline = tokenizer("\n", add_special_tokens=False).input_ids[0]
    ends = (rows == newline).tolist()
    for row in ends:
        assert row == [False, True] * 6


def test_sampling_follows_the_model(model, tokenizer, monkeypatch):
    forward = model.forward

    def counts_up(**inputs):
        out = forward(**inputs)
        out.logits.zero_().scatter_(2, (inputs["input_ids"] % 200 + 2)[..., None], 1000.0)
        return out

    monkeypatch.setattr(model, "forward", counts_up)
    rows = sample_from_model(model, tokenizer, 10, seed=1, window=10, batch=1)
    assert rows.tolist() == [list(range(2, 22, 2))]


# ---------------------------------------------------------------------------------------- storage


def test_stored_tokens_come_back_bit_for_bit(tmp_path, tokenizer):
    tokens = TokenData(
        fit_WT=torch.arange(32).view(2, 16),
        held_WT=torch.arange(16).view(1, 16),
        num_documents=3,
        text_sha256="ab" * 32,
        source="x.txt",
        starts_with_bos=True,
    )
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        save_tokens(tokens, folder)
    again = load_tokens(tmp_path / "a")
    assert torch.equal(again.fit_WT, tokens.fit_WT) and torch.equal(again.held_WT, tokens.held_WT)
    facts = {key: value for key, value in vars(tokens).items() if not key.endswith("_WT")}
    assert {key: vars(again)[key] for key in facts} == facts
    for name in ("tokens.safetensors", "tokens.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("name", ["tokens.safetensors", "tokens.json"])
def test_damaged_tokens_are_named(tmp_path, name):
    tokens = TokenData(torch.ones(1, 2).long(), torch.ones(1, 2).long(), 1, "", "self", False)
    save_tokens(tokens, tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(InputError, match="the stored tokens are damaged"):
        load_tokens(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match="the stored tokens are damaged"):
        load_tokens(tmp_path)


def test_separator_is_one_blank_line():
    assert documents.SEPARATOR == "\n\n"
