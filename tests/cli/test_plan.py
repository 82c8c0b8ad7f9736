import json
import re

import orjson
import pytest
from shapes import GLM5
from typer.testing import CliRunner

from hetero_glm5.cli import app
from hetero_glm5.model_config import DEMO
from hetero_glm5.placement.memory import GIB

FP8 = {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}}


@pytest.fixture(scope="module")
def glm5(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "GLM-5-FP8"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(GLM5 | FP8 | {"eos_token_id": 1}))
    return str(folder)


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def told(*arguments, code=0):
    return orjson.loads(run(*arguments, "--json", code=code))


RTX4090 = "--ram 512 --ram-bandwidth 460 --cores 48 --vram 24 --vram-bandwidth 1008 --pcie 25"
RTX5090 = "--ram 768 --ram-bandwidth 460 --cores 64 --vram 32 --vram-bandwidth 1792 --pcie 50"
PRO6000 = "--ram 1024 --ram-bandwidth 920 --cores 128 --sockets 2 --vram 96 --vram-bandwidth 1792 --pcie 50"
DESKTOP = "--ram 192 --ram-bandwidth 90 --cores 16"
CPU_ONLY = "--ram 1024 --ram-bandwidth 500 --cores 64"

WORKSTATIONS = {  # flags, fits, what is missing, what would do instead
    "RTX 4090": (RTX4090, False, {"RAM", "GPU memory"}, "experts in INT4, attention on the CPU"),
    "RTX 5090": (RTX5090, False, {"GPU memory"}, "experts in INT4, attention on the CPU"),
    "RTX PRO 6000": (PRO6000, True, None, None),
    "desktop": (DESKTOP, False, {"RAM"}, "experts in INT4 in a store that stays on disk (mmap)"),
    "CPU only": (CPU_ONLY, True, None, None),
}


@pytest.mark.parametrize("name", WORKSTATIONS)
def test_five_workstations(glm5, name):
    line, fits, short, instead = WORKSTATIONS[name]
    flags = line.split()
    found = told("--model", glm5, *flags, code=0 if fits else 1)
    assert found["fits"] == fits
    if not fits:
        assert set(found["missing_gib"]) == short and found["instead"] == {"way": instead, "missing_gib": {}}
        assert "GiB" in found["error"] and all(gib > 0 for gib in found["missing_gib"].values())
    size = found["bytes"]
    assert size["dense weights"] == pytest.approx(35.86 * GIB, rel=1e-3)
    assert size["KV pool"] == found["kv_tokens"] * 109824
    bits = {"FP8": 8.01, "INT4": 4.378}[found["method"]]
    assert size["host experts"] == pytest.approx(724.776e9 * bits / 8, rel=2e-3)
    low, high = found["speed"]["decode_tokens_per_second"]
    bandwidth = float(flags[flags.index("--ram-bandwidth") + 1])
    ceiling = bandwidth * 1e9 / (22.65e9 * bits / 8)  # by the experts alone
    assert 0 < low < high < ceiling
    if name != "desktop":
        assert high > 0.2 * ceiling
    assert 0 < found["speed"]["prefill_tokens_per_second"][0] < found["speed"]["prefill_tokens_per_second"][1]


def test_what_the_smallest_way_needs(glm5):
    found = told("--model", glm5, "--ram", "24", "--ram-bandwidth", "50", "--cores", "2", code=1)
    way = found["instead"]
    assert way["way"] == "experts in INT4 in a store that stays on disk (mmap)" and "launch" not in found
    output = run("--model", glm5, "--ram", 24 + way["missing_gib"]["RAM"], "--ram-bandwidth", "50", code=1)
    assert f"instead  {way['way']}\n" in output and "launch" in output
    assert f"{way['way']}, with " in run("--model", glm5, "--ram", "24", "--ram-bandwidth", "50", code=1)


def test_the_formula_sums_to_the_figure(glm5):
    found = told("--model", glm5, *PRO6000.split())
    for end, formula in zip((0, 1), ("low", "high"), strict=True):
        parts = found["speed"]["formulas"][f"decode, {formula}"].rsplit("=", 1)[1]
        milliseconds = sum(map(float, re.findall(r"[\d.]+", parts)))
        assert 1e3 / found["speed"]["decode_tokens_per_second"][end] == pytest.approx(milliseconds, abs=0.2)


def test_the_text_says_it_all(glm5):
    output = " ".join(run("--model", glm5, *RTX5090.split(), code=1).split())
    for words in (
        "fits no. memory: dense weights 35.86 GiB",
        "missing 13 GiB of GPU memory",
        "instead experts in INT4, attention on the CPU",
        "decode, low: dense 36.61 GB / 276 GB/s",
        f"launch hetero-glm5 quantize {glm5} GLM-5-FP8-INT4 --kt-method INT4",
        f"launch python -m hetero_glm5.launch_server --model {glm5} --device cpu --kt-weight-path GLM-5-FP8-INT4 "
        "--kt-weight-mode ram --reasoning-parser glm45 --tool-call-parser glm47",
    ):
        assert words in output, output
    output = run("--model", glm5, *PRO6000.split())
    assert re.search(r"note +the device has room for \d+ experts of each layer", output) and "both" not in output


def test_launch_flags_are_taken_and_told(glm5):
    flags = "--kt-num-gpu-experts 12 --chunked-prefill-size 4096 --kt-gpu-prefill-token-threshold 1024 --port 8000"
    found = told(*PRO6000.split(), "--model", glm5, *flags.split())
    assert found["device_experts"] == 75 * 12 and found["host_experts"] == 75 * 244
    assert "streamed" in found["speed"]["formulas"]["prefill, high"]
    (launch,) = found["launch"]
    assert launch.startswith("python -m hetero_glm5.launch_server --model ") and set(flags.split()) <= set(
        launch.split()
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--ram", "512"], "--ram-bandwidth is missing"),
        (["--ram", "0", "--ram-bandwidth", "90"], "--ram is 0.0; it must be at least 1"),
        (["--kt-num-gpu-expert", "4"], "did you mean --kt-num-gpu-experts?"),
        (["--vran", "4"], "did you mean --vram?"),
        (["--page-size", "x"], "--page-size"),
        (["GLM-5"], "'GLM-5' belongs to no flag"),
        (["--cores", "1", "--sockets", "2", "--ram-bandwidth", "90"], "2 sockets need a core each"),
    ],
)
def test_refusals(glm5, flags, words):
    output = run("--model", glm5, *flags, code=1)
    assert "error: " in output and words in output


def test_this_machine_without_measuring():
    found = told("--model", DEMO, "--no-measure", "--device", "cpu")
    assert found["fits"] and "speed" not in found and found["machine"]["cores"] >= 1


def test_this_machine_measured():
    found = told("--model", DEMO, "--device", "cpu", "--chunked-prefill-size", "64", "--max-running-requests", "2")
    low, high = found["speed"]["decode_tokens_per_second"]
    assert 0 < low <= high and "attention" in found["speed"]["formulas"]["decode"]
