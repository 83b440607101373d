"""Orthogonal matrices whose entries are all of one size, for as many sizes as there are simple constructions of them.

Numerics: Sylvester 1867 (powers of two), Paley 1933 (On orthogonal matrices, J. Math. Phys. 12: sizes p + 1 for primes
p = 3 mod 4 and 2 (p + 1) for p = 1 mod 4), and Kronecker products of these. 576 = 16 x 36 with p = 17, 960 = 16 x 60
with p = 59. A size without one (9) gets a power of two times an orthogonal matrix drawn from the Haar measure
(Mezzadri 2007, arXiv:math-ph/0609050): less even, orthogonal all the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def rotation(size: int, generator: torch.Generator) -> torch.Tensor:
    """(size, size) float64, orthogonal: Hadamard over sqrt(size), rows of random sign (QuaRot, section 3)."""
    import torch

    signs = torch.randint(0, 2, (size,), generator=generator, dtype=torch.float64) * 2 - 1
    return _orthogonal(size, generator) * signs[:, None]


def _orthogonal(size: int, generator: torch.Generator) -> torch.Tensor:
    import torch

    power = size & -size
    for outer in (2**k for k in range(power.bit_length())):  # the smaller the Sylvester part, the larger Paley's
        inner = hadamard(size // outer) if size // outer % 2 == 0 or size == outer else None
        if inner is not None:
            return torch.kron(_sylvester(outer), inner) / size**0.5  # type: ignore[no-any-return]
    q, r = torch.linalg.qr(torch.randn(size // power, size // power, generator=generator, dtype=torch.float64))
    drawn = (q * torch.sign(r.diagonal())).contiguous()
    return torch.kron(_sylvester(power) / power**0.5, drawn)


def hadamard(size: int) -> torch.Tensor | None:
    """A Hadamard matrix of ``size``, entries 1 and -1, by one construction; None where none of them has this size."""
    if size & (size - 1) == 0:
        return _sylvester(size)
    if size % 4 == 0 and _prime(size - 1):
        return _paley_one(size - 1)
    if size % 4 == 0 and _prime(size // 2 - 1) and (size // 2 - 1) % 4 == 1:
        return _paley_two(size // 2 - 1)
    return None


def _sylvester(size: int) -> torch.Tensor:
    import torch

    made = torch.ones(1, 1, dtype=torch.float64)
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(made) < size:
        made = torch.kron(made, step)
    return made


def _prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _jacobsthal(p: int) -> torch.Tensor:
    """(p, p): whether i - j is a square modulo p (1), none (-1), or zero (0)."""
    import torch

    squares = {i * i % p for i in range(1, p)}
    character = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, p)], dtype=torch.float64)
    index = torch.arange(p)
    return character[(index[:, None] - index[None, :]) % p]


def _paley_one(p: int) -> torch.Tensor:
    import torch

    made = torch.zeros(p + 1, p + 1, dtype=torch.float64)
    made[0, 1:], made[1:, 0], made[1:, 1:] = 1.0, -1.0, _jacobsthal(p)
    return made + torch.eye(p + 1, dtype=torch.float64)


def _paley_two(p: int) -> torch.Tensor:
    import torch

    made = torch.zeros(p + 1, p + 1, dtype=torch.float64)
    made[0, 1:], made[1:, 0], made[1:, 1:] = 1.0, 1.0, _jacobsthal(p)
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(made, plus) + torch.kron(torch.eye(p + 1, dtype=torch.float64), diagonal)
