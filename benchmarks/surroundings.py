"""What every benchmark says about where it ran, and how it rounds; the other files here import it as scripts do."""

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
