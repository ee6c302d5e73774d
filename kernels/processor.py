"""What is known of the processor: which form of an operator is the fastest depends on it."""

import functools
from pathlib import Path


@functools.cache
def described() -> dict[str, str]:
    """The first entry of Linux's list of processors, by name; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def is_intel() -> bool:
    """Whether Intel made it, for whose processors the library is that PyTorch takes for matrix products in fp32."""
    return described().get("vendor_id") == "GenuineIntel"


def has_bf16_tiles() -> bool:
    """Whether it multiplies matrices of bf16 in hardware (AMX)."""
    return "amx_bf16" in described().get("flags", "").split()
