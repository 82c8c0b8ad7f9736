"""The command that writes the corpus: the same bytes from every process."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

from hetero_glm5.demo.corpus import KINDS, documents


def test_two_processes_write_the_same_bytes(tmp_path):
    for hash_seed in ("1", "2"):
        command = [sys.executable, "-m", "hetero_glm5.demo.corpus", str(tmp_path / hash_seed), "--documents", "40"]
        subprocess.run([*command, "--seed", "5"], check=True, env=os.environ | {"PYTHONHASHSEED": hash_seed})
    written = (tmp_path / "1").read_bytes()
    assert written == (tmp_path / "2").read_bytes()
    lines = [json.loads(line) for line in written.decode().splitlines()]
    assert [line["kind"] for line in lines] == [kind for kind in KINDS for _ in range(40)]
    for kind in KINDS:
        here = [[list(piece) for piece in d.pieces] for d in itertools.islice(documents(kind, "train", 5), 40)]
        assert here == [line["pieces"] for line in lines if line["kind"] == kind]
        other = [[list(piece) for piece in d.pieces] for d in itertools.islice(documents(kind, "train", 6), 40)]
        assert here != other
