"""Budgets per layer against equal shares at equal bytes, on texts that no search saw.

    python tools/evidence_budget.py --model FOLDER --data DIR --out OUT.md [--keep 0.5 0.4]
        [--unselected] [--selection fixed | threshold | relative]

FOLDER is a dense model, DIR holds calib.txt, heldout_wiki.txt and heldout_c4.txt. Neurons are kept
by exact size, those left out counting as zero; or (`--unselected`) by expected error, those left
out counting by 4-bit estimate. With a `--selection` by level, kept is what reaches the score that
as many neurons reach on average in calib.txt; of the held-out texts the mean kept is told.
Intervals are 95 %, paired over windows. OUT.md is written anew after every row; scores are kept in
OUT.scores, so that it can be stopped and started again.

Shape suffixes: W windows, T tokens of a window.
"""

import argparse
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hireconvert.allocation import Allocation, Keeps, Trades
from hireconvert.budget import Memo, Trials, descend, evolve, solve
from hireconvert.data import evaluation_windows
from hireconvert.families import find_layout
from hireconvert.lowbit import ffn_inputs, live_copies
from hireconvert.masked import MaskedModel, as_selected
from hireconvert.paired import block_mean, perplexity_ratio
from hireconvert.schema import FfnRecipe
from hireconvert.schema_budget import BudgetRecipe

HELD = ("heldout_wiki", "heldout_c4")
# The fields of the shipped recipes, as a simulation needs them.
FORM: dict[str, Any] = {"bits": 4, "block": 32, "symmetric": True, "levels": "normal"}
ESTIMATED: dict[str, Any] = {"predictor": FORM, "unselected": FORM, "score": "error"}
HEAD = (
    "| keep | shares | KL searched | perplexity over dense, wiki / c4 | KL, wiki / c4 "
    "| perplexity over equal shares, wiki | c4 | KL less that of equal shares, both "
    "| neurons kept, wiki / c4 | windows scored |\n"
    "|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|"
)


def windows(path: Path, tokenizer: Any, num_tokens: int, window: int) -> torch.Tensor:
    """Token ids [W, T], the windows spread evenly over the whole text."""
    text = path.read_text(encoding="utf-8")
    ids_WT = evaluation_windows(text, tokenizer, window=window).ids_WT
    place_W = torch.linspace(0, len(ids_WT) - 1, num_tokens // window).long()
    return ids_WT[place_W]


class Table:
    """Rows of the table and the lists behind them, written at once."""

    def __init__(self, out: Path, held: dict[str, Trials], search: Trials) -> None:
        self.out, self.held, self.search = out, held, search
        self.rows: list[str] = []
        self.lists: list[str] = []

    def add(self, keep: float, name: str, keeps: Keeps, equal: Keeps, scored: str) -> None:
        """One list of shares."""
        over, kl, against, differences, kept = [], [], [], [], []
        for trials in self.held.values():
            dense_W = trials.masked.dense_nll_W
            score, base = trials.score(keeps), trials.score(equal)
            ones = [1] * len(dense_W)
            ratio = perplexity_ratio(score.nll_W, dense_W, ones)
            over.append(f"{ratio.point - 1:+.2%}")
            kl.append(f"{score.kl:.4f}")
            kept.append(f"{score.kept:.0f}")
            relative = perplexity_ratio(score.nll_W, base.nll_W, ones)
            points = (relative.point, relative.low, relative.high)
            against.append("{:+.2%} [{:+.2%}, {:+.2%}]".format(*(one - 1 for one in points)))
            differences += [a - b for a, b in zip(score.kl_W, base.kl_W, strict=True)]
        both = block_mean(differences, [1] * len(differences))
        less = f"{both.point:+.4f} [{both.low:+.4f}, {both.high:+.4f}]"
        cells = [f"{keep:g}", name, f"{self.search.score(keeps).kl:.4f}", " / ".join(over)]
        cells += [" / ".join(kl), *(against if keeps != equal else ["", ""])]
        cells += [less if keeps != equal else "", " / ".join(kept), scored]
        self.rows.append("| " + " | ".join(cells) + " |")
        active = sum(self.search.allocation.active(keeps))
        shares = " ".join(f"{share:g}" for share in keeps)
        self.lists.append(f"- {keep:g}, {name}, {active} neurons a token: `{shares}`")
        self.out.write_text("\n".join([HEAD, *self.rows, "", *self.lists, ""]), encoding="utf-8")


def compare(args: argparse.Namespace) -> None:
    """Search at every keep and fill the table."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    layout = find_layout(model)
    texts = {
        "search": windows(args.data / "calib.txt", tokenizer, args.tokens, args.window),
        **{
            name: windows(args.data / f"{name}.txt", tokenizer, args.held_tokens, args.window)
            for name in HELD
        },
    }
    recipe = BudgetRecipe(
        generations=args.generations, sweeps=args.sweeps, probe_tokens=args.probe_tokens
    )
    fields = ESTIMATED if args.unselected else {}
    if args.selection != "fixed":
        fields = {**fields, "selection": args.selection, "keep": "candidates", "over_select": 20.0}
    else:
        fields = {**fields, "over_select": 1.0}
    scored = {"tokens": [args.tokens, args.held_tokens], "unselected": args.unselected}
    scored["selection"] = args.selection
    ffn = FfnRecipe(keep_fraction=args.keep[0], **fields)
    memo = Memo(args.out.with_suffix(".scores"), {**scored, "score": ffn.score})
    copies = ()
    if args.unselected:
        copies = live_copies(model, layout, ffn, inputs=ffn_inputs(model, layout, texts["search"]))
    with ExitStack() as stack:
        masked = {
            name: stack.enter_context(MaskedModel.of(model, layout, ids_WT, ffn, copies))
            for name, ids_WT in texts.items()
        }
        as_selected(ffn, list(masked.values()))
        neurons = masked["search"].neurons
        for keep in args.keep:
            ffn = FfnRecipe(keep_fraction=keep, **fields)
            allocation = Allocation(neurons, ffn)
            trials = {name: Trials(name, one, allocation, memo) for name, one in masked.items()}
            search = trials.pop("search")
            table = args.table = args.table or Table(args.out, trials, search)
            table.held, table.search = trials, search
            trades = Trades(allocation, allocation.start, recipe.step)
            table.add(keep, "equal", allocation.start, allocation.start, "")
            searches = {
                "greedy": lambda tell: descend(search, trades, recipe, tell),  # noqa: B023
                "evolution": lambda tell: evolve(search, trades, recipe, args.seed, tell),  # noqa: B023
                "second_order": lambda tell: solve(search, trades, args.seed, tell),  # noqa: B023
            }
            for name in args.methods:
                before, start = search.num_windows_scored, time.perf_counter()
                keeps = searches[name](lambda *step: print(*step, file=sys.stderr))
                cost = search.num_windows_scored - before
                print(f"{keep} {name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
                table.add(keep, name, keeps, allocation.start, str(cost))


def main() -> None:
    """Read the arguments and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.4])
    parser.add_argument("--methods", nargs="+", default=["greedy", "evolution"])
    parser.add_argument("--unselected", action="store_true", help="left out count by estimate")
    parser.add_argument("--selection", choices=["fixed", "threshold", "relative"], default="fixed")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--held-tokens", type=int, default=6144, help="of each text")
    parser.add_argument("--probe-tokens", type=int, default=512)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--generations", type=int, default=14)
    parser.add_argument("--sweeps", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.table = None
    torch.set_num_threads(args.threads)
    compare(args)


if __name__ == "__main__":
    main()
