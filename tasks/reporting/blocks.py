"""What a page is made of. Blocks hold plain text and numbers as they are shown; the renderers escape them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Tone = Literal["", "good", "bad", "quiet", "strong"]


@dataclass(frozen=True)
class Cell:
    """A cell with a tone; the tone only underlines what the text says already."""

    text: str
    tone: Tone = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells; a row of one cell is a heading within the table. The first `num_text_columns` are text."""

    header: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    num_text_columns: int = 1
    title: str = ""
    caption: str = ""
    style: Literal["", "lead", "fine"] = ""


@dataclass(frozen=True)
class Figure:
    """A plot: SVG inside the page, PNG beside the Markdown."""

    name: str
    title: str
    svg: str
    png: bytes


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Piece:
    """A stretch of text; `marked` is what the model was trained on."""

    text: str
    marked: bool = False


@dataclass(frozen=True)
class Column:
    """Preformatted text under a label."""

    label: str
    pieces: Sequence[Piece]
    note: str = ""


@dataclass(frozen=True)
class Columns:
    """Texts to compare, side by side where there is room, under a title."""

    title: str
    columns: Sequence[Column]
    folded: Column | None = None  # what they have in common (a prompt), folded away where the form allows


@dataclass(frozen=True)
class Gallery:
    """Figures side by side where there is room."""

    figures: Sequence[Figure]


Block = Table | Figure | Text | Columns | Gallery


@dataclass(frozen=True)
class Section:
    """A titled part of the page; `folded` ones are reference, opened by a click."""

    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)
    folded: bool = False
