"""Writes documents as JSON lines: python -m hetero_glm5.demo.corpus OUT [--split train] [--seed 0] [--documents N]"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

from hetero_glm5.demo.corpus import KINDS, documents
from hetero_glm5.demo.corpus.words import SPLITS


def main() -> None:
    parser = argparse.ArgumentParser(prog="corpus", description="Write the demo model's corpus as JSON lines.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--documents", type=int, default=1000, help="of each kind")
    args = parser.parse_args()
    with open(args.out, "w", encoding="utf-8") as out:
        for kind in KINDS:
            for document in itertools.islice(documents(kind, args.split, args.seed), args.documents):
                out.write(json.dumps({"kind": kind, "pieces": document.pieces}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
