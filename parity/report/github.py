"""What GitHub shows: annotations of a step, its summary, and text that fits a comment.

Owns GitHub's limits. Must not know what a report says. Easy to get wrong: limits are of bytes, and
a table cut in the middle of a row is no table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from parity.report import tables
from parity.report.tables import Failure

MOST_ANNOTATIONS = 10
"""GitHub shows no more annotations of one kind in a step."""
MOST_ANNOTATION_BYTES = 4_000
"""Longer ones are folded away; the log has all of it."""
MOST_SUMMARY_BYTES = 900_000
"""GitHub refuses a step summary above 1 MiB."""
MOST_COMMENT_BYTES = 60_000
"""GitHub refuses a comment above 65,536 characters."""


@dataclass
class Section:
    """A part of a report that may lose lines from its end.

    Attributes:
        head: what stands before the lines, kept whole; it goes where every line goes.
        lines: what may be cut, each whole or not at all.
        tail: what stands after them, kept whole.
        weight: sections of a higher one are filled first.
    """

    head: str
    lines: list[str] = field(default_factory=list)
    tail: str = ""
    weight: int = 0


def fitted(sections: Sequence[Section], most: int, where: str) -> str:
    """Join sections into a text of at most `most` bytes, cutting lines and counting them.

    Args:
        sections: in the order of reading.
        most: bytes of UTF-8.
        where: what the reader is told about the place of the whole.
    """
    room = most - sum(_size(s.head) + _size(s.tail) + _size(_cut(10**6, where)) for s in sections)
    kept = [0] * len(sections)
    for index in sorted(range(len(sections)), key=lambda i: -sections[i].weight):
        for line in sections[index].lines:
            if _size(line) > room:
                break
            room -= _size(line)
            kept[index] += 1
    parts = []
    for section, number in zip(sections, kept, strict=True):
        gone = len(section.lines) - number
        note = f"\n{_cut(gone, where)}\n" if gone else ""
        # a note may not stand inside a table: it ends the table instead
        parts.append("\n".join([section.head, *section.lines[:number]]) + note + section.tail)
    return "\n".join(part for part in parts if part) + "\n"


def _cut(count: int, where: str) -> str:
    return f"_{count} more rows were cut to fit; {where}._"


def _size(text: str) -> int:
    return len(text.encode()) + 1 if text else 0


def summary(text: str, room: int = MOST_SUMMARY_BYTES) -> str:
    """Cut a report to what a step summary takes, at a blank line, and say what is gone."""
    if len(text.encode()) <= room:
        return text
    blocks = text.split("\n\n")
    kept, left = [], room - 200
    for block in blocks:
        left -= len(block.encode()) + 2
        if left < 0:
            break
        kept.append(block)
    fence = "\n```" if sum(block.count("```") for block in kept) % 2 else ""
    gone = len(blocks) - len(kept)
    return "\n\n".join(kept) + f"{fence}\n\n_{gone} more parts were cut to fit; see report.md._\n"


def annotation_lines(failures: Iterable[Failure]) -> list[str]:
    """Write the workflow commands that mark the first failures, the worst ones."""
    said = []
    for failure in list(failures)[:MOST_ANNOTATIONS]:
        text = _shortened(tables.block(failure))
        level = "warning" if failure.is_known else "error"
        said.append(f"::{level} title={escape(failure.case, is_property=True)}::{escape(text)}")
    return said


def _shortened(text: str) -> str:
    raw = text.encode()
    if len(raw) <= MOST_ANNOTATION_BYTES:
        return text
    return raw[:MOST_ANNOTATION_BYTES].decode(errors="ignore") + "\n..."


def escape(text: str, *, is_property: bool = False) -> str:
    """Escape text for a workflow command, as the runner's toolkit does."""
    text = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return text.replace(":", "%3A").replace(",", "%2C") if is_property else text
