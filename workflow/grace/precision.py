"""How many bits a weight has: the widths there are, the range of their codes, and the names of precisions.

`int4-outliers` is 4-bit codes of weights under the outlier transform (`grace.quant.outliers`). No torch in here.
"""

from grace.errors import GraceError

BITS = (2, 3, 4, 8)
INTEGERS = tuple(f"int{bits}" for bits in reversed(BITS))  # names, from the widest to the narrowest
_ANY = f"int[{''.join(map(str, BITS))}]"
INTEGER_PATTERN = f"{_ANY}(-outliers)?"
PRECISION_PATTERN = f"(bf16|{_ANY})(-outliers)?"


def code_range(bits: int) -> tuple[int, int]:
    """(-Qn, Qp) = (-2^(bits-1), 2^(bits-1) - 1), the lowest and highest of signed codes of this width.

    Raises:
        GraceError: a width that is not in `BITS`.
    """
    if bits not in BITS:
        raise GraceError(f"bits: {bits} is not a width that can be quantised to; use 2, 3, 4 or 8")
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def split_precision(precision: str) -> tuple[int | None, bool]:
    """The bits of a precision's name, and whether it is under the outlier transform.

    `int4-outliers` -> (4, True); `bf16` -> (None, False).
    """
    name, _, outliers = precision.partition("-")
    return (None if name == "bf16" else int(name.removeprefix("int"))), bool(outliers)
