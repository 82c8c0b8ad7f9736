"""`hetero-glm5 quantize` and `verify`: what they write, what they refuse, and that being killed costs nothing."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from contextlib import closing

import numpy as np
import pytest
import torch
from int4 import KINDS, draw, int4_checkpoint, values
from safetensors.torch import load_file, save_file
from tiny import tiny_checkpoint
from typer.testing import CliRunner

from hetero_glm5.cli import app
from hetero_glm5.weights.checkpoint import Checkpoint
from hetero_glm5.weights.convert import Conversion, relative_error
from hetero_glm5.weights.expert_source import read_expert
from hetero_glm5.weights.expert_store import ExpertStore
from hetero_glm5.weights.quantize import METHODS, ExpertLayout, PackedExperts


@pytest.fixture
def checkpoint(checkpoints):
    return tiny_checkpoint(checkpoints, dtype="bfloat16")


def run(*arguments, code=0, **options):
    """stdout and stderr of a command, which must end with `code`."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], **options)
    assert result.exit_code == code, result.output
    return result.output


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("method", METHODS)
def test_bytes_depend_on_neither_threads_nor_the_run(checkpoints, tmp_path, method):
    folder = tiny_checkpoint(checkpoints, dtype="bfloat16", fp8=method == "FP8")
    for threads in (1, 2, 5):
        run("quantize", folder, tmp_path / f"{threads}", "--kt-method", method, "--threads", threads)
    one = content(tmp_path / "1")
    assert sorted(one) == ["errors.json", *(f"layer-{layer:05}.safetensors" for layer in (2, 3, 4, 5))]
    assert content(tmp_path / "2") == one and content(tmp_path / "5") == one
    assert "all as they were written" in run("verify", tmp_path / "1")
    again = run("quantize", folder, tmp_path / "1", "--kt-method", method.lower())
    assert "4 of 4 layers are there already" in again and content(tmp_path / "1") == one


KILLED = """
import os, signal, sys
from hetero_glm5.cli import app
from hetero_glm5.weights.expert_store import LayerWriter

write = LayerWriter.write
def stop(self, expert, blob, error):
    write(self, expert, blob, error)
    if self.head.layer == 4 and expert == 7:
        os.kill(os.getpid(), signal.SIGKILL)

LayerWriter.write = stop
app(sys.argv[1:])
"""


def test_being_killed_costs_nothing_but_the_layer_in_hand(checkpoint, tmp_path):
    out = tmp_path / "out"
    command = ["quantize", checkpoint, out, "--kt-method", "BF16", "--threads", "2"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *map(str, command)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    kept = ["layer-00002.safetensors", "layer-00003.safetensors"]
    assert sorted(content(out)) == [*kept, "layer-00004.safetensors.partial"]
    assert "layer-00004.safetensors (layer 4), and 1 more layers are missing" in run("verify", out, code=1)
    untouched = [(out / name).stat().st_ino for name in kept]
    assert "2 of 4 layers are there already" in run(*command)
    assert [(out / name).stat().st_ino for name in kept] == untouched
    run("quantize", checkpoint, tmp_path / "whole", "--kt-method", "BF16")
    assert content(out) == content(tmp_path / "whole")


def test_a_failure_leaves_no_half_written_layer(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert "error: [Errno 28] No space left" in run(
        "quantize", checkpoint, tmp_path / "o", "--kt-method", "BF16", code=1
    )
    assert not list((tmp_path / "o").iterdir())


def test_the_error_is_measured_and_told(checkpoints, tmp_path):
    """From fp32 to BF16: rounding to 8 bits of mantissa loses about 2^-9 / sqrt(3) / 0.7 of a weight."""
    folder = tiny_checkpoint(checkpoints)
    output = run("quantize", folder, tmp_path / "o", "--kt-method", "BF16")
    report = json.loads((tmp_path / "o" / "errors.json").read_text())
    assert report["method"] == "BF16" and [entry["layer"] for entry in report["layers"]] == [2, 3, 4, 5]
    for entry in report["layers"]:
        assert 0.0015 < entry["mean"] < 0.0018 and entry["mean"] <= entry["worst"] < 0.0018
        line = f"{entry['layer']:>12}{entry['mean']:>12.3e}{entry['worst']:>12.3e}{entry['worst_expert']:>12}"
        assert line in output
    store, checkpoint = ExpertStore(tmp_path / "o"), Checkpoint(folder)
    for expert in (0, 9):
        weights = torch.cat([part.flatten() for part in read_expert(checkpoint, 3, expert)[:3]]).double()
        error = (weights.bfloat16() - weights).norm() / weights.norm()
        assert store.files[3].errors[expert] == pytest.approx(error.item(), rel=1e-3)


def test_nothing_is_lost_where_the_format_is_kept(checkpoints):
    for fp8, method in ((False, "BF16"), (True, "FP8"), (True, "FP32")):
        checkpoint = Checkpoint(tiny_checkpoint(checkpoints, dtype="bfloat16", fp8=fp8))
        raw = read_expert(checkpoint, 2, 1)
        packed = PackedExperts(ExpertLayout(method, 256, 128), 1)
        packed.set(0, *raw)
        assert relative_error(raw, packed) == 0.0
        packed.blob(0).zero_()
        assert relative_error(raw, packed) == 1.0


def test_progress_reaches_exactly_the_end(checkpoint, tmp_path):
    seen = []
    with closing(Conversion(checkpoint, tmp_path / "o", "BF16")) as conversion:
        conversion.run(threads=2, report=seen.append)
    assert len(seen) == 4 * 16 and seen[-1].bytes_done == seen[-1].bytes_total == 4 * 16 * 3 * 256 * 128 * 2
    seen.clear()
    ExpertStore(tmp_path / "o").verify(2, seen.append)
    assert seen[-1].bytes_done == seen[-1].bytes_total and seen[-1].stage == "layer 5"


def test_on_a_terminal_there_is_a_table(checkpoint, tmp_path):
    output = run("quantize", checkpoint, tmp_path / "o", "--kt-method", "BF16", env={"FORCE_COLOR": "1"})
    assert "┃" in output and "packing" not in output.splitlines()[-1]


def test_verify_names_every_damaged_expert(checkpoint, tmp_path):
    run("quantize", checkpoint, tmp_path / "o", "--kt-method", "BF16")
    for layer, expert in ((3, 15), (5, 2)):
        file = ExpertStore(tmp_path / "o").files[layer]
        blobs = np.memmap(file.path, np.uint8, "r+", file.start, (16, file.head.layout.blob_bytes))
        blobs[expert, 5] ^= 1
        blobs.flush()
    output = run("verify", tmp_path / "o", code=1)
    for words in ("expert 15 of layer 3", "expert 2 of layer 5"):
        assert sum(words in line and line.startswith("error: ") for line in output.splitlines()) == 1
    assert "error: " + str(tmp_path / "nowhere") in run("verify", tmp_path / "nowhere", code=1)


Usage = namedtuple("Usage", "total used free")


def strange_file(out, checkpoint):
    out.mkdir()
    (out / "notes.txt").touch()


def another_method(out, checkpoint):
    run("quantize", checkpoint, out, "--kt-method", "FP32")


def other_weights(out, checkpoint):
    other = tiny_checkpoint(checkpoint.parent, dtype="bfloat16", seed=1)
    run("quantize", other, out, "--kt-method", "BF16")


def cut_layer(out, checkpoint):
    run("quantize", checkpoint, out, "--kt-method", "BF16")
    with (out / "layer-00004.safetensors").open("r+b") as file:
        file.truncate(100_000)


STATES = {
    "a file": (lambda out, _: out.touch(), ["is a file", "new folder"]),
    "something else": (strange_file, ["notes.txt", "new folder"]),
    "the checkpoint": (lambda out, checkpoint: shutil.copytree(checkpoint, out), ["belongs to no store"]),
    "another method": (another_method, ["layer-00002", "FP32", "BF16", "new folder"]),
    "other weights": (other_weights, ["layer-00002", "other weights"]),
    "a damaged layer": (cut_layer, ["layer-00004", "expert", "is cut", "Delete the file"]),
}


@pytest.mark.parametrize("state", STATES)
def test_an_out_that_holds_something_else_is_left_alone(checkpoint, tmp_path, state):
    make, words = STATES[state]
    make(tmp_path / "out", checkpoint)
    before = content(tmp_path / "out") if (tmp_path / "out").is_dir() else None
    output = run("quantize", checkpoint, tmp_path / "out", "--kt-method", "BF16", code=1)
    assert all(word in output for word in ["error: ", str(tmp_path / "out"), *words]), output
    assert before is None or content(tmp_path / "out") == before


def test_what_cannot_work_is_refused_before_anything_is_written(checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "out"
    for folder, method, words in (
        (tmp_path / "nowhere", "BF16", ["nowhere", "not a checkpoint"]),
        (checkpoint, "BF15", ["--kt-method", "BF15", "did you mean BF16"]),
        (checkpoint, "auto", ["--kt-method", "auto", "must be one of"]),
    ):
        output = run("quantize", folder, out, "--kt-method", method, code=1)
        assert all(word in output for word in words), output
    assert "--kt-method" in run("quantize", checkpoint, out, code=2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 40, 0, 1 << 20))
    output = run("quantize", checkpoint, out, "--kt-method", "BF16", code=1)
    assert "4 layers of 16 experts as BF16 take 0.01 GiB" in output and "0.00 GiB of free space" in output
    assert not out.exists()


def test_fp8_of_a_checkpoint_that_is_not_is_refused(checkpoint, tmp_path):
    if "FP8" in METHODS:
        output = run("quantize", checkpoint, tmp_path / "out", "--kt-method", "FP8", code=1)
        assert "is not FP8" in output and "Traceback" not in output


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["INT4", "RAWINT4", "GPTQ_INT4"])
def test_an_int4_checkpoint_loses_nothing(checkpoints, tmp_path, kind, name):
    folder = int4_checkpoint(checkpoints, kind, 64, torch.float16)
    output = run("quantize", folder, tmp_path / "o", "--kt-method", name)
    assert "as INT4" in output and f"{'all':>12}{0:>12.3e}{0:>12.3e}" in output
    store = ExpertStore(tmp_path / "o")
    assert (store.layout.group, store.layout.book) == (64, "linear") and list(store.files) == [2, 3, 4, 5]
    packed = PackedExperts(store.layout, 16)
    store.read(5, 9, packed.blob(9))
    name = "model.layers.5.mlp.experts.9.gate_proj.weight"
    assert torch.equal(packed.dequantize(9)[0], values(*draw(name, (128, 256), 64, torch.float16), 64))


def test_experts_that_are_not_int4_are_quantised_with_their_books(checkpoints, tmp_path):
    """An MTP layer that was left out, say. What it costs is in the report."""
    source = int4_checkpoint(checkpoints, KINDS[0])
    folder = shutil.copytree(source, tmp_path / "mixed")
    tensors, plain = (load_file(path / "model.safetensors") for path in (source, tiny_checkpoint(checkpoints)))
    last = "model.layers.5.mlp.experts."
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(last)}
    tensors |= {name: tensor for name, tensor in plain.items() if name.startswith(last)}
    save_file(tensors, str(folder / "model.safetensors"))
    run("quantize", folder, tmp_path / "o", "--kt-method", "INT4")
    report = json.loads((tmp_path / "o" / "errors.json").read_text())
    assert [entry["worst"] == 0 for entry in report["layers"]] == [True, True, True, False]
    assert report["layers"][3]["worst"] < 0.1 and ExpertStore(tmp_path / "o").layout.book == "linear"


def test_an_fp8_checkpoint_loses_nothing(checkpoints, tmp_path):
    folder = tiny_checkpoint(checkpoints, dtype="bfloat16", fp8=True)
    run("quantize", folder, tmp_path / "o", "--kt-method", "FP8")
    store, checkpoint = ExpertStore(tmp_path / "o"), Checkpoint(folder)
    assert {error for file in store.files.values() for error in file.errors} == {0.0}
    *codes, scales = read_expert(checkpoint, 5, 9)
    packed = PackedExperts(store.layout, 16)
    store.read(5, 9, packed.blob(9))
    for stored, code, scale in zip(packed.dequantize(9), codes, scales, strict=True):
        assert torch.equal(stored, code.float() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1))


def test_group_and_book_are_chosen(checkpoints, tmp_path):
    """Larger groups lose more, the linear books lose more, and an INT4 checkpoint keeps what agrees with its own."""
    imported, plain = int4_checkpoint(checkpoints, "gptq", 32, torch.float16), tiny_checkpoint(checkpoints)
    errors = {}
    for number, (folder, method, group, book) in enumerate(
        [
            (plain, "INT4", 32, "gaussian"),
            (plain, "INT4", 64, "gaussian"),
            (plain, "INT4", 128, "gaussian"),
            (plain, "INT4", 32, "linear"),
            (plain, "INT8", 32, ""),
            (plain, "INT8", 128, ""),
            (imported, "INT4", 32, "linear"),
            (imported, "INT4", 64, ""),
        ]
    ):
        flags = ["--group", group, *(["--book", book] if book else [])]
        run("quantize", folder, tmp_path / f"{number}", "--kt-method", method, *flags)
        layout = ExpertStore(tmp_path / f"{number}").layout
        assert (layout.group, layout.book) == (group, book or {"INT4": "gaussian"}.get(method, ""))
        errors[number] = json.loads((tmp_path / f"{number}" / "errors.json").read_text())["mean"]
    assert 0.055 < errors[0] < errors[1] < errors[2] < 0.1 and errors[0] < errors[3] < 0.1
    assert 0.003 < errors[4] < errors[5] < 0.01 and errors[6] == 0 and errors[7] > 0.05


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["BF16", "--group", "64"], "--group is 64, but BF16 has no groups"),
        (["INT4", "--group", "16"], "--group is 16, must be 32, 64 or 128 in INT4"),
        (["INT8", "--book", "linear"], "--book is 'linear', but INT8 has no books"),
        (["INT4", "--book", "Gauss"], "--book is 'Gauss', must be gaussian or linear"),
    ],
)
def test_a_group_or_book_that_cannot_be_is_refused(checkpoint, tmp_path, flags, words):
    output = run("quantize", checkpoint, tmp_path / "o", "--kt-method", *flags, code=1)
    assert f"error: {words}; change it or leave it out." in output and not (tmp_path / "o").exists()


def test_two_at_a_time_are_refused(checkpoint, tmp_path):
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert "another hetero-glm5 quantize" in run("quantize", checkpoint, tmp_path, "--kt-method", "BF16", code=1)
    os.close(handle)
    run("quantize", checkpoint, tmp_path, "--kt-method", "BF16")


PEAK = """
import sys
import torch
from hetero_glm5.cli.quantize import quantize
from pathlib import Path
memory = lambda key: next(int(line.split()[1]) for line in open("/proc/self/status") if key in line) << 10
before = memory("VmRSS")
quantize(Path(sys.argv[1]), Path(sys.argv[2]), "BF16", int(sys.argv[3]))
print(memory("VmHWM") - before)
"""


@pytest.mark.parametrize("threads", [1, 3])
def test_memory_is_bounded_by_the_threads(checkpoints, tmp_path, threads):
    """402 MB of experts. A thread holds one expert as read, packed (2 bytes a weight each) and unpacked (4); with what
    malloc keeps of them it is about 14 bytes a weight at this size, 10 at GLM-5's."""
    sizes = {"hidden_size": 1024, "moe_intermediate_size": 1024, "n_routed_experts": 32}
    folder = tiny_checkpoint(checkpoints, dtype="bfloat16", num_hidden_layers=4, num_nextn_predict_layers=0, **sizes)
    command = [sys.executable, "-c", PEAK, str(folder), str(tmp_path / "o"), str(threads)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(result.stdout.splitlines()[-1]) < threads * 20 * 3 * 1024 * 1024 + 40e6
