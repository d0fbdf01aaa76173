"""The inline PTX that unpacks codes, run by an interpreter of the instructions it uses, in both 16-bit formats.

Triton's own interpreter skips inline PTX. Arithmetic here is float64 rounded once, as PTX defines .rn.
"""

import pytest
import torch
from ptx import run

from grace.kernels import w4a16_triton as kernels

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def random_words(cases: int, seed: int) -> torch.Tensor:
    return torch.randint(
        -(1 << 31), 1 << 31, (cases,), dtype=torch.int32, generator=torch.Generator().manual_seed(seed)
    )


def codes(words: torch.Tensor, nibble: int) -> torch.Tensor:
    """The codes at one nibble of both int16 words of each int32: [cases, 2]."""
    return ((words.view(torch.int16).view(-1, 2).int() >> 4 * nibble) & 15) - 8


@pytest.mark.parametrize("kind", TYPES)
def test_codes(kind):
    words = random_words(4096, 0)
    found = run(getattr(kernels, f"_CODES_{kind.upper()}").value, [words], 4)
    for nibble, register in enumerate(found):
        values = register.view(TYPES[kind]).view(-1, 2)
        assert torch.equal(values.int(), codes(words, nibble)) and torch.equal(values, values.round())


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", ["FIRST", "SECOND"])
def test_weights_are_rounded_once(kind, name):
    words, dtype = random_words(4096, 1), TYPES[kind]
    steps = (torch.rand(4096, 2, generator=torch.Generator().manual_seed(2)) * 0.05 + 1e-3).to(dtype)
    found = run(getattr(kernels, f"_{name}_{kind.upper()}").value, [words, steps.view(torch.int32).flatten()], 2)
    for nibble, register in enumerate(found, start=2 * (name == "SECOND")):
        expected = (codes(words, nibble).float() * steps.float()).to(dtype)
        assert torch.equal(register.view(dtype).view(-1, 2), expected)


@pytest.mark.parametrize("kind", TYPES)
def test_all_weights_of_a_word_are_those_of_its_halves(kind):
    words = random_words(4096, 3)
    steps = (torch.rand(4096, 2, generator=torch.Generator().manual_seed(4)) + 1e-3).to(TYPES[kind])
    operands = [words, steps.view(torch.int32).flatten()]
    halves = [run(getattr(kernels, f"_{half}_{kind.upper()}").value, operands, 2) for half in ("FIRST", "SECOND")]
    whole = run(getattr(kernels, f"WEIGHTS_{kind.upper()}").value, operands, 4)
    assert all(torch.equal(one, other) for one, other in zip(whole, halves[0] + halves[1], strict=True))
