"""Lay out finished tables as Markdown, LaTeX (booktabs), HTML or a terminal table; knows strings, no numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from html import escape as html_escape

from rich.console import Group
from rich.markup import escape as rich_escape
from rich.table import Table as RichTable

MISSING = "\N{EN DASH}"
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "±": r"$\pm$", "\N{MINUS SIGN}": "$-$", MISSING: "--",
}  # fmt: skip


@dataclass(frozen=True)
class Text:
    """One cell as it will be read."""

    text: str
    bold: bool = False


@dataclass(frozen=True)
class Block:
    """Rows that may be compared with one another, under one caption."""

    caption: str
    rows: tuple[tuple[Text, ...], ...]


@dataclass(frozen=True)
class Sheet:
    """A table ready for printing: title, header, blocks of rows, the notes that make it readable alone, and what it shows."""

    title: str
    header: tuple[str, ...]
    blocks: tuple[Block, ...]
    notes: tuple[str, ...]
    closing: tuple[str, ...] = ()


def markdown(sheet: Sheet) -> str:
    """Return the sheet as GitHub Markdown with one table; block captions are rows of their own."""
    lines = [
        f"### {_markdown_escape(sheet.title)}",
        "",
        _markdown_line([_markdown_escape(h) for h in sheet.header]),
    ]
    lines.append("|" + "|".join([":--"] + ["--:"] * (len(sheet.header) - 1)) + "|")
    for block in sheet.blocks:
        if block.caption:
            lines.append(_markdown_line([f"*{_markdown_escape(block.caption)}*"] + [""] * (len(sheet.header) - 1)))
        lines += [_markdown_line([_markdown_cell(cell) for cell in row]) for row in block.rows]
    lines += ["", *(f"- {_markdown_escape(note)}" for note in sheet.notes), ""]
    for sentence in sheet.closing:
        lines += [_markdown_escape(sentence), ""]
    return "\n".join(lines)


def latex(sheet: Sheet) -> str:
    """Return the sheet as a LaTeX table; needs `\\usepackage{booktabs}` and nothing else."""
    columns = "l" + "r" * (len(sheet.header) - 1)
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{latex_escape(sheet.title)}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
    ]
    lines.append(_latex_line([latex_escape(h) for h in sheet.header]))
    for block in sheet.blocks:
        caption = rf"\multicolumn{{{len(sheet.header)}}}{{l}}{{\emph{{{latex_escape(block.caption)}}}}} \\"
        lines += [r"\midrule", *([caption] if block.caption else [])]
        lines += [_latex_line([_latex_cell(cell) for cell in row]) for row in block.rows]
    lines += [r"\bottomrule", r"\end{tabular}", r"\par\raggedright\footnotesize"]
    lines += [latex_escape(note) + r"\par" for note in (*sheet.notes, *sheet.closing)]
    return "\n".join([*lines, r"\end{table}", ""])


def html(sheet: Sheet) -> str:
    """Return the sheet as an HTML table without style but alignment: a notebook and a page bring their own."""
    left, right = ' style="text-align: left"', ' style="text-align: right"'

    def cell(text: str, place: int, name: str = "td") -> str:
        return f"<{name}{left if place == 0 else right}>{text}</{name}>"

    head = "".join(cell(html_escape(title), place, "th") for place, title in enumerate(sheet.header))
    lines = [f"<table><caption>{html_escape(sheet.title)}</caption>", f"<thead><tr>{head}</tr></thead>"]
    for block in sheet.blocks:
        lines.append("<tbody>")
        if block.caption:
            lines.append(f'<tr><td colspan="{len(sheet.header)}"{left}><em>{html_escape(block.caption)}</em></td></tr>')
        for row in block.rows:
            texts = [f"<b>{html_escape(one.text)}</b>" if one.bold else html_escape(one.text) for one in row]
            lines.append(f"<tr>{''.join(cell(text, place) for place, text in enumerate(texts))}</tr>")
        lines.append("</tbody>")
    lines.append("</table>")
    if sheet.notes:
        lines.append(f"<ul>{''.join(f'<li><small>{html_escape(note)}</small></li>' for note in sheet.notes)}</ul>")
    lines += [f"<p>{html_escape(sentence)}</p>" for sentence in sheet.closing]
    return "\n".join([*lines, ""])


def terminal(sheet: Sheet) -> Group:
    """Return a rich renderable: the table, then its notes in dim type."""
    table = RichTable(title=rich_escape(sheet.title), title_justify="left", header_style="bold")
    for position, name in enumerate(sheet.header):
        table.add_column(rich_escape(name), justify="left" if position == 0 else "right")
    for block in sheet.blocks:
        table.add_row(f"[italic]{rich_escape(block.caption)}[/italic]")
        for row in block.rows:
            table.add_row(*(f"[bold]{rich_escape(c.text)}[/bold]" if c.bold else rich_escape(c.text) for c in row))
        table.add_section()
    return Group(table, *(f"[dim]{rich_escape(note)}[/dim]" for note in sheet.notes), *map(rich_escape, sheet.closing))


def latex_escape(text: str) -> str:
    """Return `text` with every character that LaTeX gives a meaning replaced by its printing form."""
    return "".join(_LATEX.get(character, character) for character in text)


def _markdown_escape(text: str) -> str:
    return re.sub(r"([\\|*_`<>])", r"\\\1", text).replace("\n", " ")


def _markdown_line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _markdown_cell(cell: Text) -> str:
    escaped = _markdown_escape(cell.text)
    return f"**{escaped}**" if cell.bold else escaped


def _latex_line(cells: list[str]) -> str:
    return " & ".join(cells) + r" \\"


def _latex_cell(cell: Text) -> str:
    escaped = latex_escape(cell.text)
    return rf"\textbf{{{escaped}}}" if cell.bold else escaped
