"""What the manual shows, as blocks that a test can run: commands, Python, recipes.

A block runs unless the line before it is an HTML comment, which readers do not see:
    <!-- names only: REASON -->   commands are checked for their names and options; REASON is one of REASONS
    <!-- part of another file --> YAML that is no recipe
`python -m tests.documents.blocks` lists the commands that are not run, and why.
"""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING", "SECURITY")),
]
LANGUAGES = ("sh", "python", "yaml", "json", "text")
REASONS = ("a cluster", "a cloud", "Docker", "it waits until you end it", "minutes or more", "files that you download",
           "it installs")  # fmt: skip
_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<language>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


class Block(NamedTuple):
    """`mark`: what the comment before it says, "" without one; `line`: of its first line of text."""

    path: Path
    line: int
    language: str
    mark: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"

    @property
    def reason(self) -> str | None:
        """Why its commands are not run; None where they are."""
        name, _, reason = self.mark.partition(": ")
        return reason if name == "names only" else None

    @property
    def commands(self) -> list[str]:
        """Of a block of shell: one text a command, lines that go on joined, comments left out; of others none."""
        if self.language != "sh":
            return []
        joined = re.sub(r"\\\n\s*", "", self.text)
        return [line for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def blocks_of(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("text")) + 1
        found.append(Block(path, line, match["language"], match["mark"] or "", match["text"]))
    return found


if __name__ == "__main__":
    for document in DOCUMENTS:
        for block in blocks_of(document):
            for command in block.commands if block.reason else ():
                print(f"{block.place}  {block.reason}: {command}")
