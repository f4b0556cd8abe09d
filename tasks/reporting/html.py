"""The page as one HTML file: no script, no request, nothing from outside. Every text is escaped here."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby

from tasks.reporting.blocks import Block, Cell, Column, Columns, Figure, Gallery, Section, Table, Text
from tasks.reporting.style import CSS


def render_html(title: str, subtitle: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole page."""
    facts = "".join(f"<li>{escape(fact)}</li>" for fact in subtitle)
    body = "\n".join(_section(section) for section in sections)
    # The policy forbids every request, should a text ever get past the escaping.
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        f'<header><p class="brand">steep</p><h1>{escape(title)}</h1><ul class="facts">{facts}</ul></header>\n'
        f"{body}\n</main>\n</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    blocks = "\n".join(_group(group) for group in _grouped(section.blocks))
    if section.folded:
        return f"<section><details><summary><h2>{escape(section.title)}</h2></summary>\n{blocks}\n</details></section>"
    return f"<section><h2>{escape(section.title)}</h2>\n{blocks}\n</section>"


def _grouped(blocks: Sequence[Block]) -> list[list[Block]]:
    """Tables that follow one another stand side by side where there is room."""
    return [list(group) for _, group in groupby(blocks, key=lambda block: isinstance(block, Table))]


def _group(blocks: Sequence[Block]) -> str:
    parts = "\n".join(_block(block) for block in blocks)
    return f'<div class="tables">{parts}</div>' if isinstance(blocks[0], Table) else parts


def _block(block: Block) -> str:
    match block:
        case Table():
            return _table(block)
        case Gallery():
            return f'<div class="gallery">{"".join(_figure(figure) for figure in block.figures)}</div>'
        case Figure():
            return _figure(block)
        case Text():
            return f"<p>{escape(block.text)}</p>"
        case Columns():
            return _columns(block)


def _figure(figure: Figure) -> str:
    # Ids inside an SVG are the page's; two plots must not share them.
    svg = figure.svg.replace('id="', f'id="{figure.name}-').replace("url(#", f"url(#{figure.name}-")
    svg = svg.replace('href="#', f'href="#{figure.name}-')
    return f"<figure><figcaption>{escape(figure.title)}</figcaption>{svg}</figure>"


def _table(table: Table) -> str:
    head = "".join(f'<th class="{_kind(i, table)}">{escape(text)}</th>' for i, text in enumerate(table.header))
    body = "\n".join(_row(row, table) for row in table.rows)
    title = f"<h3>{escape(table.title)}</h3>" if table.title else ""
    caption = f"<caption>{escape(table.caption)}</caption>" if table.caption else ""
    return (f'<div class="scroll {table.style}">{title}<table>{caption}<thead><tr>{head}</tr></thead>\n'
            f"<tbody>\n{body}\n</tbody></table></div>")  # fmt: skip


def _row(row: Sequence[str | Cell], table: Table) -> str:
    if len(row) == 1 and len(table.header) > 1:
        return f'<tr class="heading"><th colspan="{len(table.header)}">{_text(row[0])}</th></tr>'
    return "<tr>" + "".join(_cell(cell, _kind(i, table)) for i, cell in enumerate(row)) + "</tr>"


def _cell(cell: str | Cell, kind: str) -> str:
    tone = cell.tone if isinstance(cell, Cell) else ""
    return f'<td class="{kind} {tone}">{_text(cell)}</td>'


def _text(cell: str | Cell) -> str:
    return escape(cell.text if isinstance(cell, Cell) else cell)


def _kind(column: int, table: Table) -> str:
    return "text" if column < table.num_text_columns else "number"


def _columns(block: Columns) -> str:
    folded = ""
    if block.folded:
        folded = f"<details><summary>{escape(block.folded.label)}</summary>{_pre(block.folded)}</details>"
    columns = "".join(
        f'<div><h4>{escape(column.label)} <span class="quiet">{escape(column.note)}</span></h4>{_pre(column)}</div>'
        for column in block.columns
    )
    return f'<div class="compare"><h3>{escape(block.title)}</h3>{folded}<div class="columns">{columns}</div></div>'


def _pre(column: Column) -> str:
    pieces = (f"<mark>{escape(p.text)}</mark>" if p.marked else escape(p.text) for p in column.pieces)
    return f"<pre>{''.join(pieces)}</pre>"
