"""Writes the settings of the SmolLM2 tables as JSON: `python settings_smollm2.py OUT.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

OVER = 1.3


def setting(name: str, ffn: dict[str, Any] | None = None, **predictor: Any) -> dict[str, Any]:
    """One entry of a settings file."""
    return {"name": name, "ffn": {"over_select": OVER, **(ffn or {})}, "predictor": predictor}


def kinds(*, centre: bool) -> list[dict[str, Any]]:
    """Three kinds and shares of inputs."""
    mark = "" if centre else " uncentred"
    found = []
    for keep in (1.0, 0.6, 0.5, 0.4):
        for bits in (4, 3):
            name = f"q{bits} inputs {keep:g}{mark}"
            found.append(setting(name, kind="q", bits=bits, input_keep=keep, centre=centre))
        name = f"q2+r48 inputs {keep:g}{mark}"
        found.append(setting(name, kind="qlr", bits=2, rank=48, input_keep=keep, centre=centre))
    found.append(setting(f"lr128{mark}", kind="lr", rank=128, centre=centre))
    return found


def more() -> list[dict[str, Any]]:
    """Low-rank factors of few bits at about the bytes of four-bit copies, and two bits alone."""
    return [
        setting("q2", kind="q", bits=2),
        setting("lr256 8 bits", kind="lr", rank=256, factor_bits=8),
        setting("lr500 4 bits", kind="lr", rank=500, factor_bits=4),
    ]


def groups() -> list[dict[str, Any]]:
    """Groups and common paths on the 4-bit copy, and direct group scores."""
    found = []
    for common in (0.0, 0.1):
        for group in (1, 4, 8, 16):
            ffn = {"group_size": group, "common_path": common}
            found.append(setting(f"q4 groups {group} common {common:g}", ffn, kind="q", bits=4))
            if group > 1:
                name = f"q4 group scores {group} common {common:g}"
                found.append(setting(name, ffn, kind="q", bits=4, group_scores=True))
    return found


def distilled() -> list[dict[str, Any]]:
    """Trained factors."""
    train = {"loss": "bce", "steps": 200, "batch_rows": 512, "learning_rate": 0.002}
    return [
        setting("lr128 distilled", kind="lr", rank=128, distill=train),
        setting("q2+r48 inputs 1 distilled", kind="qlr", bits=2, rank=48, distill=train),
    ]


ESSENTIAL = (
    "q4 inputs 1",
    "q3 inputs 1",
    "q2+r48 inputs 1",
    "q4 inputs 0.6",
    "q4 inputs 0.5",
    "q3 inputs 0.5",
    "q3 inputs 0.4",
    "lr128",
    "lr128 distilled",
    "q2+r48 inputs 1 distilled",
    "q4 inputs 1 uncentred",
    "q3 inputs 0.5 uncentred",
    "q4 groups 4 common 0",
    "q4 groups 8 common 0",
    "q4 groups 16 common 0",
    "q4 groups 1 common 0.1",
    "q4 group scores 4 common 0",
)


def main() -> None:
    """Writes all settings (for recall), or with `essential` those worth a perplexity."""
    found = kinds(centre=True) + more() + groups() + kinds(centre=False)
    if sys.argv[2:] == ["essential"]:
        named = {entry["name"]: entry for entry in found + distilled()}
        found = [named[name] for name in ESSENTIAL]
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
