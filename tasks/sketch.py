"""A line plot as SVG, by hand: matplotlib would cost the orchestrator a second of import for one picture."""

from __future__ import annotations

from collections.abc import Sequence

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 720, 270, 64, 36, 26
MAX_POINTS = 600  # more would not be seen
INK, LINE = "#8a93a3", "#2f7ed8"  # read on white and on black


def line_svg(xs: Sequence[float], ys: Sequence[float], name: str) -> str:
    """The points as one line, with the range of both axes written out."""
    every = max(1, len(xs) // MAX_POINTS)
    xs, ys = [*xs[::every], *xs[-1:]], [*ys[::every], *ys[-1:]]
    low, high = (min(ys), max(ys)) if ys else (0.0, 1.0)
    first, last = (xs[0], xs[-1]) if xs else (0.0, 1.0)

    def at(x: float, y: float) -> str:
        across = LEFT + (WIDTH - LEFT - 16) * (x - first) / ((last - first) or 1)
        down = TOP + (HEIGHT - TOP - BOTTOM) * (high - y) / ((high - low) or 1)
        return f"{across:.1f},{down:.1f}"

    points = " ".join(at(x, y) for x, y in zip(xs, ys, strict=True))
    floor = HEIGHT - BOTTOM
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="sans-serif" font-size="12" fill="{INK}">'
        f'<path d="M{LEFT},{TOP}V{floor}H{WIDTH - 16}" fill="none" stroke="{INK}" stroke-opacity="0.5"/>'
        f'<text x="{LEFT - 6}" y="{TOP + 8}" text-anchor="end">{high:.4g}</text>'
        f'<text x="{LEFT - 6}" y="{floor}" text-anchor="end">{low:.4g}</text>'
        f'<text x="{LEFT}" y="{HEIGHT - 14}">step {first:,.0f}</text>'
        f'<text x="{WIDTH - 16}" y="{HEIGHT - 14}" text-anchor="end">{last:,.0f}</text>'
        f'<text x="{LEFT}" y="{TOP - 10}">{name}</text>'
        f'<polyline points="{points}" fill="none" stroke="{LINE}" stroke-width="2"/></svg>'
    )
