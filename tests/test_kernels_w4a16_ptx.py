"""The inline PTX that unpacks codes, run by an interpreter of the instructions it uses, in both 16-bit formats.

Triton's own interpreter skips inline PTX. Arithmetic here is float64 rounded once, as PTX defines .rn.
"""

import re

import pytest
import torch

from grace.kernels import w4a16_triton as kernels

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def run(assembly: str, inputs: list[torch.Tensor], outputs: int) -> list[torch.Tensor]:
    """The registers $0.. of `assembly`, int32 [cases], for the inputs that follow them in number."""
    registers = {f"${outputs + i}": value for i, value in enumerate(inputs)}

    def read(name: str) -> torch.Tensor:
        if name in registers:
            return registers[name]
        value = int(name, 0)
        return torch.full_like(inputs[0], value - (1 << 32) if value >= 1 << 31 else value)

    def pairs(operation, names: list[str], dtype: torch.dtype) -> torch.Tensor:
        factors = [read(name).view(dtype).double() for name in names]
        return operation(*factors).to(dtype).view(torch.int32)

    body = assembly.strip().removeprefix("{").removesuffix("}")
    for line in filter(None, map(str.strip, body.split(";"))):
        opcode, _, rest = line.partition(" ")
        if opcode == ".reg":
            continue
        to, *names = re.split(r",\s*", rest)
        if opcode == "mov.b32":
            registers[to] = read(names[0])
        elif opcode == "shr.b32":
            registers[to] = ((read(names[0]).long() & 0xFFFFFFFF) >> int(names[1])).int()
        elif opcode == "lop3.b32":
            a, b, c = map(read, names[:3])
            table = int(names[3], 0)  # bit 4a + 2b + c of it is the result
            terms = [
                (a if case & 4 else ~a) & (b if case & 2 else ~b) & (c if case & 1 else ~c)
                for case in range(8)
                if table >> case & 1
            ]
            registers[to] = torch.stack(terms).sum(0, dtype=torch.int32)  # disjoint bits
        elif opcode == "fma.rn.bf16x2":
            registers[to] = pairs(lambda a, b, c: a * b + c, names, torch.bfloat16)
        elif opcode == "sub.rn.f16x2":
            registers[to] = pairs(lambda a, b: a - b, names, torch.float16)
        elif opcode == "mul.rn.f16x2":
            registers[to] = pairs(lambda a, b: a * b, names, torch.float16)
        else:
            raise AssertionError(f"unknown instruction: {line}")
    return [registers[f"${i}"] for i in range(outputs)]


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
