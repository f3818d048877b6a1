"""What every benchmark says about where it ran, and how it rounds; the other files here import it as scripts do."""

import json
import os
import platform
import re
from pathlib import Path

FLAGS = ("avx512f", "avx512_vnni", "amx_int8", "amx_bf16")


def machine(device: str = "cpu") -> str:
    """Cores, model and matrix instructions, memory, accelerator, Python."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = (re.findall(r"model name\s*:\s*(.+)", text) or [platform.processor() or platform.machine()])[0]
    flags = ", ".join(flag for flag in FLAGS if f" {flag}" in text)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    accelerator = "no accelerator"
    if device != "cpu":
        import torch

        accelerator = torch.cuda.get_device_name()
    return (
        f"{os.cpu_count()} cores of {model}{f' ({flags})' if flags else ''}, {memory:.0f} GiB, {accelerator}, "
        f"Python {platform.python_version()}"
    )


def rounded(value):
    """Floats anywhere in a JSON value to four significant digits."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def table(names: list[str], rows: list[list]) -> str:
    """A Markdown table; floats to four significant digits, None as a dash."""

    def shown(value) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        return (
            "–"
            if value is None
            else f"{value:.4g}"
            if isinstance(value, float)
            else f"{value:,}"
            if isinstance(value, int)
            else str(value)
        )

    lines = [names, ["---"] * len(names), *([shown(value) for value in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def finish(report: dict, text: str, options) -> None:
    """Write the JSON object to `options.json` and `text` to `options.out`, where they are given, with the notes that lie
    beside it as NAME_notes.md; print the object as the last line."""
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if options.out:
        notes = options.out.with_name(f"{options.out.stem}_notes.md")
        options.out.write_text(text + (f"\n{notes.read_text()}" if notes.exists() else ""))
    print(json.dumps(report))
