"""The code blocks of a Markdown page, and which of them the tests type."""
import re
from dataclasses import dataclass
from pathlib import Path

NOT_EXECUTED = "<!-- not executed by tests: "
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    reason_not_executed: str | None


def blocks(page: Path) -> list[Block]:
    """Fenced blocks that name a language, in order. The line above may say why a block is not executed."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        above = text[:match.start()].rstrip("\n").rpartition("\n")[2]
        reason = above.removeprefix(NOT_EXECUTED).removesuffix(" -->") if above.startswith(NOT_EXECUTED) else None
        found.append(Block(match[1], match[2], reason))
    return found
