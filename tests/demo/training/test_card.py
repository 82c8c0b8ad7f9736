import json

from hetero_glm5.demo.configs import demo_config
from hetero_glm5.demo.training.card import write_card


def test_the_card_tells_what_the_log_holds(tmp_path):
    lines = [
        {"stage": "dense", "step": 10, "tokens": 2_000_000, "seconds": 600.0, "held_out": {"sums": 0.25}},
        {"stage": "dense", "step": 20, "tokens": 4_000_000, "seconds": 1200.0, "held_out": {"sums": 0.125}},
        {"stage": "indexer", "step": 5, "tokens": 500_000, "seconds": 60.0, "held_out": {"indexer": 0.5}},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "measured.json").write_text('{"sums right": "97 of 100"}')
    write_card(tmp_path, demo_config(), tmp_path / "log.jsonl", "a test", tmp_path / "measured.json")
    text = (tmp_path / "README.md").read_text()
    assert "| dense | 4.0 M | 20 | 20 |" in text
    assert "| dense | 0.125 |" in text and "| indexer |  |  |  |  |  |  | 0.5 |" in text
    assert "| sums right | 97 of 100 |" in text and "On a test," in text
    assert "{" not in text
