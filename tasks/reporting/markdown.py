"""The page as Markdown, with its plots as PNG files beside it. Every text is escaped here."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tasks.reporting.blocks import Block, Cell, Column, Columns, Figure, Gallery, Section, Table, Text

SPECIAL = re.compile(r"([\\`*_\[\]<>|#~])")


def render_markdown(title: str, subtitle: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole page."""
    head = [f"# {escape(title)}", " \u00b7 ".join(escape(fact) for fact in subtitle)]
    return "\n\n".join([*head, *(_section(section) for section in sections)]) + "\n"


def escape(text: str) -> str:
    """The text as Markdown shows it literally, on one line."""
    return SPECIAL.sub(r"\\\1", text).replace("\n", " ")


def _section(section: Section) -> str:
    return "\n\n".join([f"## {escape(section.title)}", *(_block(block) for block in section.blocks)])


def _block(block: Block) -> str:
    match block:
        case Table():
            return _table(block)
        case Gallery():
            return "\n\n".join(_figure(figure) for figure in block.figures)
        case Figure():
            return _figure(block)
        case Text():
            return escape(block.text)
        case Columns():
            texts = [block.folded, *block.columns] if block.folded else block.columns
            return "\n\n".join([f"### {escape(block.title)}", *(_column(column) for column in texts)])


def _figure(figure: Figure) -> str:
    return f"![{escape(figure.title)}]({figure.name}.png)"


def _table(table: Table) -> str:
    rule = ["---" if i < table.num_text_columns else "---:" for i in range(len(table.header))]
    lines = [[escape(text) for text in table.header], rule, *(_row(row, len(table.header)) for row in table.rows)]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    title = f"**{escape(table.title)}**" if table.title else ""
    return "\n\n".join(part for part in (title, text, escape(table.caption)) if part)


def _row(row: Sequence[str | Cell], width: int) -> list[str]:
    if len(row) == 1 and width > 1:
        return [f"**{_text(row[0])}**", *[""] * (width - 1)]
    return [f"**{_text(cell)}**" if isinstance(cell, Cell) and cell.tone == "strong" else _text(cell) for cell in row]


def _text(cell: str | Cell) -> str:
    return escape(cell.text if isinstance(cell, Cell) else cell)


def _column(column: Column) -> str:
    text = "".join(piece.text for piece in column.pieces)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    label = " \u00b7 ".join(escape(part) for part in (column.label, column.note) if part)
    return f"{label}:\n\n{fence}text\n{text}\n{fence}"
