"""Random AMX programs: as assembler text, and as numpy would run them.

A program configures its tiles, loads them from memory in every way of addressing, multiplies, and stores them all.
"""

from __future__ import annotations

import numpy as np

WORDS = 1 << 14  # of 32 bits that a program may read: bytes, then bf16
OUT = 9 * 1024  # bytes a program writes: the configuration, eight tiles
INTEGER_DOTS = ("tdpbssd", "tdpbsud", "tdpbusd", "tdpbuud")
SAVED = ("rbx", "rbp", "r12", "r13", "r14", "r15")
MAIN = (
    f"enum {{ WORDS = {WORDS}, OUT = {OUT} }};"
    + """
#include <stdio.h>
#include <stdlib.h>
extern "C" void (*const programs[])(const char*, char*);
extern "C" const long program_count;
static char in[4 * WORDS];
int main(int argc, char** argv) {
  const long first = argc > 1 ? atol(argv[1]) : 0, last = argc > 1 ? first + 1 : program_count;
  char* out = static_cast<char*>(calloc(program_count, OUT));
  if (fread(in, sizeof in, 1, stdin) != 1) return 1;
  for (long i = first; i < last; i++) programs[i](in, out + i * OUT);
  return fwrite(out, OUT, program_count, stdout) != size_t(program_count);
}
"""
)


def memory(random: np.random.Generator) -> np.ndarray:
    """uint32 [WORDS]: random bits, then pairs of N(0, 1) in bf16."""
    bits = random.integers(0, 1 << 32, WORDS // 2, dtype=np.uint32)
    normal = random.standard_normal(WORDS).astype(np.float32).view(np.uint32) >> 16
    return np.concatenate([bits, normal[::2] | normal[1::2] << 16])


def assembly(programs: list[list[str]]) -> str:
    """Text that defines `programs` and `program_count` of MAIN. rdi: what is read, rsi: what is written."""
    text = [".text"]
    for i, lines in enumerate(programs):
        text += [f"program{i}:", *(f"push %{r}" for r in SAVED), *lines, *(f"pop %{r}" for r in reversed(SAVED)), "ret"]
    text += [".data", ".globl programs", "programs:", *(f".quad program{i}" for i in range(len(programs)))]
    text += [".globl program_count", f"program_count: .quad {len(programs)}", '.section .note.GNU-stack,"",@progbits']
    return "\n".join(text) + "\n"


def config_lines(rows, row_bytes, palette: int = 1) -> list[str]:
    """Loads a configuration from where a program's last one is stored."""
    head = bytes([palette]).ljust(16, b"\0") + np.array(row_bytes, "<u2").tobytes().ljust(32, b"\0")
    whole = (head + bytes(rows)).ljust(64, b"\0")
    quads = np.frombuffer(whole, "<u8")
    moves = [line for i, q in enumerate(quads) for line in (f"movabs ${q}, %rax", f"mov %rax, {i * 8}(%rsi)")]
    return [*moves, "ldtilecfg (%rsi)"]


def odd(value: np.ndarray, error: np.ndarray) -> np.ndarray:
    """float64 sums whose rounding lost `error`, rounded to odd instead: rounding to float32 is then right."""
    bits = value.view(np.int64)
    away = np.signbit(error) == np.signbit(value)
    inexact = np.isfinite(value) & (error != 0) & (bits & 1 == 0)
    return np.where(inexact, np.where(away, bits + 1, bits - 1), bits).view(np.float64)


def flushed(value: np.ndarray) -> np.ndarray:
    """float32 with subnormals as zeros of their sign."""
    return np.where(np.abs(value) < np.float32(2.0**-126), np.copysign(np.float32(0), value), value)


def plus(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float64 terms -> their sum, rounded once to float32; what is tiny after that becomes zero."""
    s = a + b
    back = s - a
    s = odd(s, (a - (s - back)) + (b - back))
    tiny = np.abs(s) < 2.0**-126 * (1 - 2.0**-25)
    return np.where(tiny, np.copysign(0.0, s), s).astype(np.float32)


class RandomProgram:
    """`lines` in assembler; `expected` uint8 [OUT]. floating: bf16 products, else all four of bytes."""

    def __init__(self, random: np.random.Generator, memory: np.ndarray, floating: bool) -> None:
        self.random, self.memory, self.floating = random, memory.view(np.uint8), floating
        m, n, k = (int(v) for v in random.integers(1, 17, 3))
        self.role = random.permutation(["C", "C", "C", "A", "A", "B", "B", "-"])
        shapes = {"C": (m, 4 * n), "A": (m, 4 * k), "B": (k, 4 * n), "-": (0, 0)}
        self.shape = [shapes[role] for role in self.role]
        self.tiles = [np.zeros(shape, np.uint8) for shape in self.shape]
        self.lines = config_lines(*zip(*self.shape, strict=True))
        self.expected = np.zeros(OUT, np.uint8)
        for _ in range(int(random.integers(5, 25))):
            step = random.choice([self.load, self.dot, self.zero], p=[0.45, 0.45, 0.1])
            step()
        self.finish()

    def pick(self, roles: str) -> int:
        return int(self.random.choice([t for t in range(8) if self.role[t] in roles]))

    def operand(self, pointer: str, offset: int, stride: int) -> tuple[list[str], str]:
        """Lines that set registers up, and the operand: base, index, scale and displacement vary."""
        base, index = self.random.choice(["rax", "rbx", "rbp", "r8", "r12", "r13", "r15"], 2, replace=False)
        scale = int(self.random.choice([1, 2, 4, 8]))
        shift = int(self.random.choice([0, -128, 64, 127, 4096, -100000]))
        lines = [f"lea {offset - shift}(%{pointer}), %{base}", f"mov ${stride // scale}, %{index}"]
        return lines, f"{shift or ''}(%{base},%{index},{scale})"

    def load(self) -> None:
        t, size = self.pick("ABC"), self.memory.size
        rows, width = self.shape[t]
        stride = 8 * int(self.random.integers(-40, 40))
        half = size // 2 if self.random.random() < 0.7 else 0
        low, high = max(0, -stride * (rows - 1)), size // 2 - max(0, stride * (rows - 1)) - width
        offset = half + 4 * int(self.random.integers(low // 4 + 1, high // 4))
        at = offset + stride * np.arange(rows)[:, None] + np.arange(width)
        self.tiles[t] = self.memory[at]
        lines, operand = self.operand("rdi", offset, stride)
        self.lines += [*lines, f"{self.random.choice(['tileloadd', 'tileloaddt1'])} {operand}, %tmm{t}"]

    def zero(self) -> None:
        t = self.pick("ABC")
        self.tiles[t] = np.zeros(self.shape[t], np.uint8)
        self.lines.append(f"tilezero %tmm{t}")

    def dot(self) -> None:
        c, a, b = (self.pick(role) for role in "CAB")
        name = "tdpbf16ps" if self.floating else str(self.random.choice(INTEGER_DOTS))
        multiply = dot_bf16 if self.floating else dot_bytes
        self.tiles[c] = multiply(name, self.tiles[c], self.tiles[a], self.tiles[b])
        self.lines.append(f"{name} %tmm{b}, %tmm{a}, %tmm{c}")

    def finish(self) -> None:
        for t, (rows, width) in enumerate(self.shape):
            if rows:
                lines, operand = self.operand("rsi", 1024 * (t + 1), 64)
                self.lines += [*lines, f"tilestored %tmm{t}, {operand}"]
                self.expected[1024 * (t + 1) :].reshape(-1)[: 64 * rows].reshape(rows, 64)[:, :width] = self.tiles[t]
        self.lines += ["sttilecfg (%rsi)", "tilerelease", "sttilecfg 64(%rsi)"]
        self.expected[0] = 1
        for t, (rows, width) in enumerate(self.shape):
            self.expected[16 + 2 * t], self.expected[48 + t] = width, rows


def dot_bytes(name: str, c: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    first, second = (np.int8 if sign == "s" else np.uint8 for sign in name[4:6])
    x = a.view(first).astype(np.int64).reshape(len(a), -1, 4)  # [M, K, 4]
    w = b.view(second).astype(np.int64).reshape(len(b), -1, 4)  # [K, N, 4]
    return (c.view(np.int32) + np.einsum("mkj,knj->mn", x, w)).astype(np.int32).view(np.uint8)


def dot_bf16(_: str, c: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    def halves(words: np.ndarray) -> list[np.ndarray]:  # even columns, odd columns
        return [flushed(w.view(np.float32)).astype(np.float64) for w in (words << 16, words & np.uint32(0xFFFF0000))]

    with np.errstate(all="ignore"):
        sums = []
        for x, w in zip(halves(a.view(np.uint32)), halves(b.view(np.uint32)), strict=True):
            total = np.zeros((len(a), w.shape[1]), np.float32)
            for k in range(len(w)):
                total = plus(x[:, k, None] * w[k], total.astype(np.float64))
            sums.append(total.astype(np.float64))
        added = plus(*sums).astype(np.float64)
        return plus(flushed(c.view(np.float32)).astype(np.float64), added).view(np.uint8)
