"""An interpreter of the few PTX instructions that unpack codes."""

import re

import torch


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
        elif opcode == "xor.b32":
            registers[to] = read(names[0]) ^ read(names[1])
        elif opcode == "prmt.b32":
            both = torch.stack([read(name) for name in names[:2]], 1).view(torch.uint8)  # bytes of a, then of b
            digits = [int(names[2], 0) >> 4 * i & 15 for i in range(4)]
            registers[to] = both[:, digits].view(torch.int32).view(-1)
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
