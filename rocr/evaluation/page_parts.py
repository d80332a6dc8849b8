"""Tables of the page of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence

from rocr.io.svg import escaped

SHORT = 16
"""Number of characters up to which a cell stays on one line."""


class Html(str):
    """Text that is HTML already."""


def table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as HTML, which scrolls sideways by itself where the screen is narrow.

    Args:
        caption: What the table shows; no other table of the page has the same.
        columns: Headings.
        rows: Cells; those of type `Html` are not escaped.
    """
    numeric = [bool(rows) and all(_is_number(row[i]) or not row[i] for row in rows) for i in range(len(columns))]
    head = "".join(
        f'<th scope="col"{" class=number" if number else ""}>{escaped(column)}</th>'
        for column, number in zip(columns, numeric, strict=True)
    )
    body = "".join(
        "<tr>" + "".join(_cell(cell, number) for cell, number in zip(row, numeric, strict=True)) + "</tr>"
        for row in rows
    )
    named = escaped(caption)
    return (
        f'<div class="scroll" role="region" aria-label="{named}" tabindex="0"><table><caption>{named}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(text: str, number: bool) -> str:
    inner = text if isinstance(text, Html) else escaped(text)
    kind = " class=number" if number else " class=short" if len(text) <= SHORT else ""
    return f"<td{kind}>{inner}</td>"


def _is_number(text: str) -> bool:
    return text.replace(".", "").replace("%", "").replace("-", "").replace("e", "").isdigit()
