"""What all tables share: the Markdown of one, and the line under it."""

from __future__ import annotations

from typing import Any


def caption(environment: dict[str, Any], what: str) -> str:
    """Return the line under a table: what, where, with which versions, at which commit."""
    threads = f"{environment['threads']} thread{'s' * (environment['threads'] != 1)}"
    return (
        f"{what} {environment['cpu']}, {threads}, {environment['isa']}, "
        f"torch {environment['torch']}, commit {environment['commit'][:10]}.\n"
    )


def table(header: str, alignments: str, rows: list[list[str]]) -> str:
    """Return a Markdown table; `alignments` has one l or r per column."""
    rule = "|".join({"l": "---", "r": "---:"}[letter] for letter in alignments)
    lines = [header, f"|{rule}|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "".join(line + "\n" for line in lines)
