"""The pages that people read, and the code blocks in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page
    for pattern in (
        "*.md",
        "docs/**/*.md",
        "results/*.md",
        "examples/*.md",
        "benchmarks/*.md",
        "samples/*.md",
    )
    for page in ROOT.glob(pattern)
    if "_build" not in page.parts
)
_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, with the line that it starts at."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path, *languages: str) -> list[Block]:
    """The blocks of a page in these languages, or all of them, in order."""
    text = page.read_text()
    found = []
    for match in _FENCE.finditer(text):
        block = Block(page, text.count("\n", 0, match.start()) + 2, match[1].strip(), match[2])
        if not languages or block.language in languages:
            found.append(block)
    return found


def name(page: Path) -> str:
    """How tests call a page."""
    return str(page.relative_to(ROOT))
