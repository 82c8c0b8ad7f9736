"""The emulator against numpy, on random programs in the assembler's encodings; and what it refuses."""

import os
import signal
import subprocess

import amx_programs
import numpy as np
import pytest
from amx_programs import OUT, RandomProgram, config_lines

SHAPES = [(16, 64)] * 8  # of all tiles: rows, bytes


@pytest.fixture
def build(compiled, tmp_path):
    """Programs as lines -> a binary that runs them all, or the one whose number it is told."""

    def call(programs):
        texts = {"main.cpp": amx_programs.MAIN, "programs.s": amx_programs.assembly(programs)}
        for name, text in texts.items():
            (tmp_path / name).write_text(text)
        return compiled("programs", *(str(tmp_path / name) for name in texts))

    return call


@pytest.fixture
def run(emulator):
    """A binary of `build`, the memory its programs read -> its process, with the emulator."""

    def call(binary, memory, *arguments):
        environment = {**os.environ, "LD_PRELOAD": str(emulator)}
        return subprocess.run([binary, *arguments], input=memory.tobytes(), env=environment, capture_output=True)

    return call


def canonical(out: np.ndarray, floating: bool) -> np.ndarray:
    """A product that is NaN may be any NaN."""
    words = out.view(np.uint32).copy()
    if floating:
        words[np.isnan(words.view(np.float32))] = 0x7FC00000
    return words


@pytest.mark.parametrize("floating", [True, False])
def test_random_programs(build, run, floating):
    random = np.random.default_rng(floating)
    memory = amx_programs.memory(random)
    programs = [RandomProgram(random, memory, floating) for _ in range(100)]
    dots = sum("tdpb" in line for program in programs for line in program.lines)
    assert dots > 400
    result = run(build([program.lines for program in programs]), memory)
    assert result.returncode == 0, result.stderr
    for program, out in zip(programs, np.frombuffer(result.stdout, np.uint8).reshape(-1, OUT), strict=True):
        same = canonical(out, floating) == canonical(program.expected, floating)
        assert same.all(), "\n".join([*program.lines, f"words {np.flatnonzero(~same)}"])


REFUSED = {
    "no configuration": ["tilezero %tmm0"],
    "palette 2": config_lines(*zip(*SHAPES, strict=True), palette=2),
    "17 rows": config_lines([17, *[16] * 7], [64] * 8),
    "68 bytes": config_lines([16] * 8, [68, *[64] * 7]),
    "a ninth tile": config_lines([16] * 9, [64] * 9),
    "rows without bytes": config_lines([16] * 8, [0, *[64] * 7]),
    "a tile without rows": [*config_lines([0, *[16] * 7], [0, *[64] * 7]), "tilezero %tmm0"],
    "after release": [*config_lines([16] * 8, [64] * 8), "tilerelease", "tilezero %tmm0"],
    "C twice": [
        *config_lines([16] * 8, [64] * 8),
        ".byte 0xc4, 0xe2, 0x72, 0x5c, 0xc0",
    ],  # the assembler refuses it too
    "rows of C and A": [*config_lines([16, 8, *[16] * 6], [64] * 8), "tdpbsud %tmm2, %tmm1, %tmm0"],
    "columns of A, rows of B": [*config_lines([16] * 8, [64, 32, *[64] * 6]), "tdpbsud %tmm2, %tmm1, %tmm0"],
    "columns of C and B": [*config_lines([16] * 8, [64, 64, 32, *[64] * 5]), "tdpbf16ps %tmm2, %tmm1, %tmm0"],
    "two bytes and a half": [*config_lines([16] * 8, [62, *[64] * 7]), "tilestored %tmm0, (%rsi,%rax,1)"],
    "another extension": ["ud2"],
}


def test_what_a_processor_refuses_ends_the_process(build, run):
    memory = amx_programs.memory(np.random.default_rng(0))
    binary = build([*REFUSED.values(), ["nop"]])
    for i, name in enumerate(REFUSED):
        result = run(binary, memory, str(i))
        assert result.returncode == -signal.SIGILL and b"no processor with AMX" in result.stderr, name
    assert run(binary, memory, str(len(REFUSED))).returncode == 0
