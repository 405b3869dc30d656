"""Changes of a converted folder that somebody could make, by mistake or to do harm.

They are drawn from a seed, looking at the folder as it was made; tests/fuzz_apply.py says what a
change is.
"""

import json
import random
from collections.abc import Callable, Mapping
from typing import Any

from tests.fuzz_apply import FLOATS, NOT_FINITE, Change, at_path, parse, places

CONFIG, PREDICTORS = "config.json", "hire/predictors.safetensors"

NASTY: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 48, 64, 95, 96, 97,
    192, 1000, 2**16, 2**24, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, -(2**63), 10**30, 10**400,
    0.5, 1.0, 4.0, -0.0, 1e-45, 1e-7, 3e38, 1e300, float("nan"), float("inf"), -float("inf"),
    "", " ", "q", "lr", "8", "4", "mlp", "up_proj", "weight", "layers", "model", "__class__", "..",
    "../../x", "a.b", "layers.0", "gate_proj:7/2", "up_proj:0/2", "self_attn", "\ud800", "\0",
    "x" * 5000, [], {}, [1], [[]], {"a": 1}, [None] * 3, [None, None], {"rule": "threshold"},
)  # fmt: skip
# What a key may hold beside what it holds: such mutants come further than most.
KNOWN: dict[str, tuple[Any, ...]] = {
    "kind": ("q", "lr", "qlr"),
    "bits": (2, 3, 4, 8, None),
    "factor_bits": (4, 8, 16),
    "block": (0, 1, 7, 8, 16, 31, 32, 33, 64, 2**24, None),
    "symmetric": (True, False),
    "levels": ("even", "normal"),
    "groups": (True, False),
    "soften": (True, False),
    "keep": ("top_k", "candidates"),
    "score": ("norm", "plain", "error"),
    "rows": ("stored", "refined", "copies"),
    "rule": ("threshold", "mean_std", "score_mass"),
    "level": (-3e38, -1, 0, 1e-45, 0.5, 1, 1.5, 3e38),
    "certified": (True, False),
    "unselected": ("estimate", "-inf", None, {"bits": 4, "block": 16, "symmetric": False}),
    "on_uncertified": ("dense", "estimate"),
    "hidden_act": ("silu", "gelu", "relu", "relu2", "tanh", "gelu_new", "quick_gelu", "sigmoid"),
    "dtype": ("float32", "bfloat16", "float16", "float64", "int8", "auto", "torch.float32"),
    "model_type": ("llama", "mistral", "qwen2", "qwen3", "gemma2", "opt", "gpt2", "bert", "mamba"),
    "rope_type": ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional"),
    "layer_types": (["full_attention"] * 2, ["sliding_attention"] * 2, ["linear_attention"] * 2),
    "attn_implementation": ("eager", "sdpa", "flash_attention_2", "flex_attention"),
}
# Keys of config.json that a model may come with although the tiny ones do not.
ADDED: tuple[tuple[str, Any], ...] = (
    ("attn_implementation", "eager"), ("attn_implementation", "flash_attention_2"),
    ("quantization_config", {"quant_method": "bitsandbytes"}), ("quantization_config", {}),
    ("torch_dtype", "float16"), ("torch_dtype", "x"), ("layer_types", ["full_attention"] * 2),
    ("sliding_window", 1), ("head_dim", 4), ("num_experts", 4), ("final_logit_softcapping", 1e-9),
    ("final_logit_softcapping", 0.0), ("use_cache", False), ("is_encoder_decoder", True),
    ("text_config", {"hidden_size": 3}), ("vision_config", {}), ("output_attentions", True),
    ("return_dict", False), ("tie_word_embeddings", True), ("tie_word_embeddings", False),
    ("pruned_heads", {"0": [0]}), ("num_labels", -1), ("id2label", {"x": 1}), ("name_or_path", 3),
    ("rope_scaling", {"rope_type": "yarn", "factor": 0}), ("rope_scaling", {"type": "linear"}),
    ("rope_parameters", {"rope_type": "dynamic", "factor": 2.0}), ("attention_bias", True),
    ("mlp_bias", True), ("cross_attention_hidden_size", 3), ("word_embed_proj_dim", 16),
    ("max_position_embeddings", 2), ("pad_token_id", 10**6), ("dtype", {"": "float16"}),
    ("partial_rotary_factor", 0.1), ("partial_rotary_factor", 3), ("base_model_tp_plan", 3),
    ("transformers_version", 5), ("transformers_weights", "hire/predictors.safetensors"),
    ("architectures", ["BertModel"]), ("use_bidirectional_attention", True),
)  # fmt: skip
TYPES = (*FLOATS, "U8", "I8", "I16", "I32", "I64", "BOOL", "F8_E4M3", "F8_E5M2", "U16", "U64", "X")
EXTREMES = (0.0, -0.0, 1.0, -1.0, 1e-45, 6e-8, 1e-20, 1e10, 65504.0, -65504.0, 3.3e38, -3.3e38)


class Draw:
    """Mutants of one folder, given as it was made."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = files
        self.config = json.loads(files[CONFIG])
        self.hire = [p for p in places(self.config) if p[0] == "hire" and len(p) > 1]
        self.rest = [p for p in places(self.config) if p[0] != "hire"]
        self.texts = sorted(name for name in files if name.endswith(".json"))
        self.tensors = sorted(name for name in files if name.endswith(".safetensors"))
        self.headers = {name: parse(files[name])[0] for name in self.tensors}

    def mutant(self, dice: random.Random) -> list[Change]:
        """One to five changes."""
        kinds: dict[Callable[[random.Random], list[Change]], int] = {
            self._hire: 34, self._counts: 16, self._rest: 12, self._values: 12, self._entry: 7,
            self._header: 5, self._recast: 6, self._other_json: 3, self._text: 2, self._raw: 3,
        }  # fmt: skip
        number = dice.choice([1] * 12 + [2] * 5 + [3, 4, 5])
        changes: list[Change] = []
        for draw in dice.choices(list(kinds), list(kinds.values()), k=number):
            changes += draw(dice)
        return changes

    def _json(self, dice: random.Random, file: str, tree: Any, path: list[Any]) -> list[Change]:
        change: Change = {"op": "json", "file": file, "path": path, "action": "set"}
        old, roll = at_path(tree, path), dice.random()
        if roll < 0.3 and path[-1] in KNOWN:
            change["value"] = dice.choice(KNOWN[path[-1]])
        elif roll < 0.5 and type(old) in (int, float):
            change["value"] = dice.choice([old + 1, old - 1, old * 2, -old, old / 2, old + 8])
        elif roll < 0.82:
            change["value"] = dice.choice(NASTY)
        elif roll < 0.9:
            change["action"] = "remove"
        else:
            change["action"] = dice.choice(["rename", "add", "swap"])
            change["value"] = dice.choice(
                places(tree) if change["action"] == "swap" else ["x", "", *KNOWN]
            )
        return [change]

    def _hire(self, dice: random.Random) -> list[Change]:
        return self._json(dice, CONFIG, self.config, dice.choice(self.hire))

    def _rest(self, dice: random.Random) -> list[Change]:
        if dice.random() < 0.25:
            key, value = dice.choice(ADDED)
            return [{"op": "json", "file": CONFIG, "path": [key], "action": "set", "value": value}]
        return self._json(dice, CONFIG, self.config, dice.choice(self.rest))

    def _other_json(self, dice: random.Random) -> list[Change]:
        file = dice.choice([name for name in self.texts if name != CONFIG] or [CONFIG])
        tree = json.loads(self.files[file])
        return self._json(dice, file, tree, dice.choice(places(tree)))

    def _counts(self, dice: random.Random) -> list[Change]:
        """Numbers of one layer, or of the head, that fit one another: what often decodes."""
        hire = self.config["hire"]
        layers = [i for i, spec in enumerate((hire["ffn"] or {"layers": []})["layers"]) if spec]
        if not layers or dice.random() < 0.2:
            path, values = ["hire", "head"], _head_counts(dice)
        else:
            path = ["hire", "ffn", "layers", dice.choice(layers)]
            values = _layer_counts(dice, at_path(self.config, path))
        return [
            {"op": "json", "file": CONFIG, "path": [*path, key], "action": "set", "value": value}
            for key, value in values.items()
        ]

    def _tensor(self, dice: random.Random) -> tuple[str, str, dict[str, Any]]:
        hire = [name for name in self.tensors if name == PREDICTORS] * 6
        file = dice.choice([*hire, *self.tensors])
        name = dice.choice([key for key in self.headers[file] if key != "__metadata__"])
        return file, name, self.headers[file][name]

    def _values(self, dice: random.Random) -> list[Change]:
        file, name, entry = self._tensor(dice)
        how = dice.choice(["all", "some", "some", "one", "random", "scale"])
        value: Any = dice.choice(EXTREMES if dice.random() < 0.75 else NOT_FINITE)
        if entry["dtype"] not in FLOATS:
            value = dice.choice([0, 1, 127, 128, 255])
        if how == "scale":
            value = 2.0 ** dice.choice([-140, -30, -10, 10, 30, 120])
        seed = dice.randrange(2**32)
        change = {"op": "values", "file": file, "name": name, "how": how, "value": value}
        return [{**change, "seed": seed}]

    def _entry(self, dice: random.Random) -> list[Change]:
        file, name, entry = self._tensor(dice)
        field = dice.choice(["dtype", "shape", "shape", "data_offsets", "data_offsets"])
        shape, (start, end) = entry["shape"], entry["data_offsets"]
        choices: dict[str, list[Any]] = {
            "dtype": [*TYPES, *TYPES, None, 5, "", "f32", [], "F32\0"],
            "shape": [
                shape[::-1], [*shape, 1], [1, *shape], shape[:-1], [0], [], [-1, *shape[1:]],
                [2**31], [2**63], [2**64, 0], [1] * 70, [float(size) for size in shape], ["4"],
                [True, *shape[1:]], None, 4, [-size for size in shape], {"0": 1},
                [size * 2 for size in shape], [size + 1 for size in shape], [2**32, 2**32, *shape],
            ],
            "data_offsets": [
                [start + 8, end + 8], [start, end + 8], [start, end - 1], [end, start],
                [0, end - start], [start - 8, end - 8], [-8, 8], [2**63, 2**63 + 8],
                [float(start), float(end)], [start], [start, end, end], None, [None, None], "0",
                [str(start), str(end)], [start + 1, end + 1], [0, 0], [False, end],
                [start, 2**64 - 1],
            ],
        }  # fmt: skip
        value = dice.choice(choices[field])
        return [{"op": "entry", "file": file, "name": name, "field": field, "value": value}]

    def _header(self, dice: random.Random) -> list[Change]:
        file, name, _ = self._tensor(dice)
        how = dice.choice([
            "length", "duplicate", "drop", "rename", "metadata", "root", "spaces", "order", "share",
            "deep", "extra", "entry",
        ])  # fmt: skip
        values: dict[str, list[Any]] = {
            "length": [0, 1, 8, -1, 1, 2**31, 2**63, 2**64 - 1, 100_000_000, 100_000_001],
            "rename": ["", "x", name.upper(), name + ".x", name.replace("0", "7"), "__metadata__"],
            "metadata": [None, 3, [], {"format": "tf"}, {"format": 3}, {"x": {}}, {"format": "pt"}],
            "root": [None, [], 3, "x", {}],
            "spaces": [1, 7, 10_000],
            "deep": [100, 100_000],
            "entry": [None, [], 3, {}, {"dtype": "F32"}],
        }
        value = dice.choice(values.get(how, [None]))
        return [{"op": "header", "file": file, "name": name, "how": how, "value": value}]

    def _recast(self, dice: random.Random) -> list[Change]:
        file, name, _ = self._tensor(dice)
        how = dice.choice(
            ["cast", "cast", "less", "more", "flat", "deeper", "turned", "none", "drop", "rename",
             "extra", "scalar"]
        )  # fmt: skip
        value: Any = None
        if how == "cast":
            value = dice.choice(
                ["float64", "float32", "float16", "bfloat16", "int8", "uint8", "int64", "bool"]
            )
        elif how in ("rename", "extra"):
            value = dice.choice(["", "x", name + ".x", name.replace("0", "7"), "layers.-1.bias"])
        return [{"op": "recast", "file": file, "name": name, "how": how, "value": value}]

    def _text(self, dice: random.Random) -> list[Change]:
        file = dice.choice([CONFIG, CONFIG, *self.texts])
        text = dice.choice(
            [*'"{}[],:-.0e\\', "\x00", "null", "NaN", "[" * 50, "1" * 5000, "\ufeff"]
        )
        at = dice.randrange(len(self.files[file]))
        return [{"op": "text", "file": file, "at": at, "text": text}]

    def _raw(self, dice: random.Random) -> list[Change]:
        python = [name for name in self.files if name.endswith(".py")]
        file = dice.choice([*self.tensors * 3, *self.texts, dice.choice(python)])
        size = len(self.files[file])
        how = dice.choice(
            ["byte", "byte", "cut", "cut", "grow", "delete", "empty", "folder", "put"]
        )
        value: Any = None
        if how == "byte":
            value = [dice.choice([dice.randrange(size), dice.randrange(8)]), dice.randrange(256)]
        elif how == "cut":
            value = dice.choice([dice.randrange(size), size - 1, 8, 7])
        elif how == "grow":
            value = dice.choice([1, 8, 4096])
        elif how == "put":
            value = dice.choice(sorted(self.files))
        return [{"op": "raw", "file": file, "how": how, "value": value}]


def _layer_counts(dice: random.Random, spec: Mapping[str, Any]) -> dict[str, Any]:
    total, group = spec["num_neurons"], spec["group_size"]
    units = total // group
    common = dice.choice([0, 0, dice.randrange(units), spec["num_common"] // group])
    kept = dice.randint(min(common + 1, units), units)
    values: dict[str, Any] = {
        "num_common": common * group,
        "num_kept": kept * group,
        "num_candidates": dice.choice([kept, dice.randint(kept, units), units]) * group,
        "keep": dice.choice(KNOWN["keep"]),
        "score": dice.choice(KNOWN["score"]),
    }
    if dice.random() < 0.4:
        rule = dice.choice(KNOWN["rule"])
        mean = dice.choice([common * group, kept * group, kept * group - 0.5])
        selection = {"rule": rule, "level": dice.choice(KNOWN["level"]), "mean_kept": mean}
        values["selection"] = dice.choice([None, selection, selection])
    return values


def _head_counts(dice: random.Random) -> dict[str, Any]:
    counts = [1, 2, 8, 95, 96, 97, 5000, 2**31]
    return {
        "num_candidates": dice.choice(counts),
        "certify_top": dice.choice(counts),
        "certified": dice.random() < 0.6,
        "unselected": dice.choice(["estimate", "-inf"]),
        "on_uncertified": dice.choice(["dense", "estimate"]),
    }
