"""Markdown table of a file of results: bytes, recall, perplexity rise against dense and oracle.

python tools/research/tables.py FILE.jsonl
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from twin import read_results


def rise(record: dict[str, Any], dense: dict[str, Any], text: str) -> float:
    """Perplexity rise in per cent."""
    return 100 * (float(record[f"{text}_ppl"]) / float(dense[f"{text}_ppl"]) - 1)


def main() -> None:
    """Prints the table, dense and oracle rows first."""
    records = list(read_results(Path(sys.argv[1])))
    dense = next(r for r in records if r["name"] == "dense")
    oracles = {r["keep"]: r for r in records if r["name"] == "oracle"}
    tokens = ", ".join(
        f"{t} {dense[f'{t}_ppl']:.3f} ({dense[f'{t}_tokens']})" for t in ("wiki", "c4")
    )
    print(f"Dense perplexity (tokens): {tokens}.\n")
    print(
        "| keep | predictor | predictor bytes | total bytes | recall over 1.0 / over | worst "
        "layer | wiki rise (over oracle) | c4 rise (over oracle) |"
    )
    print("|--:|---|--:|--:|--:|--:|--:|--:|")
    for record in sorted(records, key=lambda r: -r["keep"]):
        if record["name"] == "dense":
            continue
        best = oracles[record["keep"]]
        cells = [f"{record['keep']:g}", record["name"]]
        if record["name"] == "oracle":
            cells += ["", "", "", ""]
        else:
            cells += [f"{100 * record[f'{key}_share']:.1f} %" for key in ("predictor", "total")]
            cells += [f"{record['recall_at_kept']:.3f} / {record['recall']:.4f}"]
            cells += [f"{record['recall_worst']:.3f}"]
        for text in ("wiki", "c4"):
            value, base = rise(record, dense, text), rise(best, dense, text)
            over = "" if record["name"] == "oracle" else f" ({value - base:+.2f})"
            cells.append(f"{value:+.2f} %{over}")
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
