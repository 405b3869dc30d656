"""Elements of one self-contained HTML page; whatever is text is escaped, nothing is fetched.

Functions that return `Html` escape what they are given, unless it is `Html` already.
"""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NewType

Html = NewType("Html", str)  # markup that these functions made

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2733; background: #f5f6f8; margin: 0; }
main { max-width: 860px; margin: 0 auto; padding: 32px 24px 64px; background: #fff; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 36px 0 8px; }
p { margin: 8px 0; } .quiet { color: #5b6673; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin: 20px 0; }
.card { flex: 1 1 150px; border: 1px solid #dfe3e8; border-radius: 8px; padding: 10px 14px; }
.card b { display: block; font-size: 22px; } .card span { color: #5b6673; font-size: 13px; }
.good b { color: #2b7a3d; } .bad b, td.bad { color: #b3301f; } td.good { color: #2b7a3d; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 12px 4px 0; text-align: right; border-bottom: 1px solid #e8ebee; }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; }
pre { background: #f5f6f8; padding: 12px; border-radius: 6px; overflow-x: auto; font-size: 13px; }
img { max-width: 100%; } summary { cursor: pointer; color: #2563a8; margin: 8px 0; }
"""
# Nothing may run or be fetched, whatever found its way into the page.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def text(value: Any) -> Html:
    """A value as text."""
    return Html(html.escape(str(value)))


def joined(parts: Iterable[Html]) -> Html:
    """One piece after another."""
    return Html("\n".join(parts))


def page(title: str, body: Html) -> str:
    """The whole document."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def heading(title: str, level: int = 2) -> Html:
    """A heading."""
    return Html(f"<h{level}>{text(title)}</h{level}>")


def paragraph(words: str, *, quiet: bool = False) -> Html:
    """A paragraph."""
    return Html(f'<p class="quiet">{text(words)}</p>' if quiet else f"<p>{text(words)}</p>")


def cards(entries: Sequence[tuple[str, str, bool | None]]) -> Html:
    """Large figures with a caption each: (figure, caption, good, bad or neither)."""
    tones = {True: " good", False: " bad", None: ""}
    made = (
        f'<div class="card{tones[good]}"><b>{text(figure)}</b><span>{text(caption)}</span></div>'
        for figure, caption, good in entries
    )
    return Html(f'<div class="cards">{"".join(made)}</div>')


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Html:
    """A table; a cell that is True or False is a coloured yes or no."""
    head = "".join(f"<th>{text(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in rows)
    return Html(
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}</tbody>\n</table></div>"
    )


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return '<td class="good">yes</td>' if value else '<td class="bad">no</td>'
    return f"<td>{text(value)}</td>"


def pairs(entries: Mapping[str, Any]) -> Html:
    """A table of names and values."""
    return table(("", ""), entries.items())


def code(words: str) -> Html:
    """Text as it is, in a block."""
    return Html(f"<pre>{text(words)}</pre>")


def folded(title: str, content: Html) -> Html:
    """Content that opens on a click."""
    return Html(f"<details><summary>{text(title)}</summary>\n{content}\n</details>")


def image(svg: str, caption: str) -> Html:
    """A drawing inside the page, as an image: what lies in it cannot act on the page."""
    data = base64.b64encode(svg.encode()).decode()
    return Html(f'<p><img alt="{text(caption)}" src="data:image/svg+xml;base64,{data}"></p>')
