"""Charts as HTML and inline SVG: they follow the page's width and colours and need neither script nor network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

ROW_HEIGHT = 22
WHISKER_REACH = 1.6  # of the longest bar; a whisker that goes further is cut there, without its end


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """One bar: `whisker` reaches from its end to a larger value (p95 beside p50), `note` stands after the value."""

    label: str
    value: float
    text: str
    tone: str  # a CSS class of `stages.report_style`: eager, peer, ours-0 …, vllm
    whisker: float | None = None
    dot: float | None = None  # stands beyond the whisker (p99 beyond p95)
    note: str = ""


def bar_chart(title: str, bars: Sequence[Bar], *, caption: str = "") -> str:
    """A titled chart of horizontal bars, one SVG a row, all on one scale that begins at 0."""
    largest = max((bar.value for bar in bars), default=0.0) or 1.0
    reach = max((max(bar.whisker or 0.0, bar.dot or 0.0) for bar in bars), default=0.0)
    longest = max(largest, min(reach, WHISKER_REACH * largest))  # one slow request must not flatten all bars
    rows = "".join(
        f'<div class="bar-row"><span class="bar-label">{escape(bar.label)}</span>'
        f'<span class="bar-plot">{_bar_svg(bar, longest)}</span>'
        f'<span class="bar-text"><b>{escape(bar.text)}</b>{_note(bar.note)}</span></div>'
        for bar in bars
    )
    foot = f'<figcaption class="caption">{escape(caption)}</figcaption>' if caption else ""
    return f'<figure class="chart"><h4>{escape(title)}</h4>{rows}{foot}</figure>'


def _note(note: str) -> str:
    return f' <span class="note">{escape(note)}</span>' if note else ""


def _bar_svg(bar: Bar, longest: float) -> str:
    middle = ROW_HEIGHT / 2
    width = max(100 * bar.value / longest, 0.4)
    parts = [f'<rect class="{bar.tone}" x="0" y="3" width="{width:.2f}%" height="{ROW_HEIGHT - 6}" rx="2"/>']
    if bar.whisker is not None and bar.whisker > bar.value:
        end = min(100 * bar.whisker / longest, 100.0)
        parts.append(f'<line class="whisker" x1="{width:.2f}%" x2="{end:.2f}%" y1="{middle:g}" y2="{middle:g}"/>')
        if bar.whisker <= longest:
            parts.append(f'<line class="whisker" x1="{end:.2f}%" x2="{end:.2f}%" y1="6" y2="{ROW_HEIGHT - 6}"/>')
    if bar.dot is not None and bar.value < bar.dot <= longest:
        end = min(100 * bar.dot / longest, 99.0)
        parts.append(f'<circle class="dot" cx="{end:.2f}%" cy="{middle:g}" r="2.2"/>')
    label = escape(f"{bar.label}: {bar.text} {bar.note}".strip(), quote=True)
    return f'<svg role="img" aria-label="{label}" width="100%" height="{ROW_HEIGHT}">{"".join(parts)}</svg>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numeric_from: int = 1, raw: bool = False) -> str:
    """An HTML table that scrolls on its own when it is wider than the page; cells are text unless `raw`."""
    cells = (lambda text: text) if raw else escape

    def cell(tag: str, index: int, text: str) -> str:
        kind = ' class="number"' if index >= numeric_from else ""
        return f"<{tag}{kind}>{cells(text) if tag == 'td' else escape(text)}</{tag}>"

    header = "".join(cell("th", index, text) for index, text in enumerate(head))
    body = "".join(f"<tr>{''.join(cell('td', i, text) for i, text in enumerate(row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>'


def milliseconds(value: float) -> str:
    """Three digits, and no powers of ten."""
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"
