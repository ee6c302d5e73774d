"""What is read of the processor, from lists as Linux writes them."""

from pathlib import Path

import pytest

from temporal_layers.kernels import processor

INTEL = "processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu avx512f amx_bf16 amx_tile\n\nprocessor\t: 1\n"
AMD = "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu avx512f avx512_bf16\n"
ARM = "processor\t: 0\nBogoMIPS\t: 2000.00\nFeatures\t: fp asimd bf16\n"


@pytest.mark.parametrize(
    ("text", "intel", "tiles"), [(INTEL, True, True), (AMD, False, False), (ARM, False, False), ("", False, False)]
)
def test_maker_and_matrix_products(monkeypatch, text, intel, tiles):
    monkeypatch.setattr(processor, "described", processor.described.__wrapped__)
    monkeypatch.setattr(Path, "read_text", lambda path, **options: text)
    assert processor.is_intel() == intel and processor.has_bf16_tiles() == tiles


def test_without_such_a_list_nothing_is_known(monkeypatch):
    def fails(path, **options):
        raise FileNotFoundError(path)

    monkeypatch.setattr(processor, "described", processor.described.__wrapped__)
    monkeypatch.setattr(Path, "read_text", fails)
    assert not processor.is_intel() and not processor.has_bf16_tiles()
