"""Draw an answer of `catid2 search`, as a terminal of 80 columns shows it, for the README: docs/assets/answer.svg.

`python docs/picture.py STORE`, with the store that `make quickstart` made. The picture asks for no font from elsewhere: what opens
it shows its own.
"""

import io
import re
import sys
from pathlib import Path

from rich.console import Console

from catid2_ray import cli
from catid2_ray.artifacts.store import Store

QUERY, COUNT = "stainless steel hinge", 4
FILE = Path(__file__).parent / "assets" / "answer.svg"


def draw(store: str) -> str:
    """The command and its answer, as SVG."""
    console = Console(record=True, width=80, force_terminal=True, color_system="truecolor", file=io.StringIO())
    console.print(f'[bold]$ catid2 search "{QUERY}" --k {COUNT}[/]', highlight=False)
    cli._answer(console, Store(store), QUERY, k=COUNT)
    svg = console.export_svg(title="catid2", unique_id="answer")
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)


if __name__ == "__main__":
    FILE.write_text(draw(sys.argv[1]), encoding="utf-8")
