import re

import orjson
import pytest
from typer.testing import CliRunner

from hetero_glm5 import _C
from hetero_glm5.cli import app, doctor
from hetero_glm5.cli.doctor import GREEN, RED, YELLOW
from hetero_glm5.hardware import PciLink

LINK = PciLink("0000:01:00.0", 16.0, 16, 32.0, 16)
NARROW = PciLink("0000:01:00.0", 16.0, 4, 32.0, 16)
GIB = 1 << 30

CHECKS = [  # check, mark, words of its text, words of its remedy
    (doctor.isa_of("amx", ["amx", "avx2"]), GREEN, "amx kernels", ""),
    (doctor.isa_of("avx2", ["avx512", "avx2"]), YELLOW, "avx2", "unset it to use avx512"),
    (doctor.isa_of("avx2", ["avx2", "scalar"]), YELLOW, "avx2", "AVX-512"),
    (doctor.isa_of("scalar", ["scalar"]), RED, "scalar", "AVX2 at least"),
    (doctor.cores(8, 16, 16), GREEN, "8 physical cores, 16 CPUs of 16", ""),
    (doctor.cores(8, 16, 64), YELLOW, "16 CPUs of 64", "cpuset"),
    (doctor.numa([0], lambda node: False), GREEN, "1 NUMA node (0)", ""),
    (doctor.numa([0, 2], lambda node: True), GREEN, "2 NUMA nodes (0, 2)", ""),
    (doctor.numa([0, 2], lambda node: node == 0), YELLOW, "2 NUMA nodes", "SYS_NICE"),
    (doctor.memory(512 * GIB, None), GREEN, "512 GiB", ""),
    (doctor.memory(512 * GIB, 900 * GIB), GREEN, "512 GiB", ""),
    (doctor.memory(512 * GIB, 64 * GIB), YELLOW, "may use 64", "plan --ram"),
    (doctor.huge_pages("madvise"), GREEN, "madvise", ""),
    (doctor.huge_pages("never"), YELLOW, "never", "transparent_hugepage"),
    (doctor.governor(set()), GREEN, "virtual", ""),
    (doctor.governor({"performance"}), GREEN, "performance", ""),
    (doctor.governor({"performance", "powersave"}), YELLOW, "performance, powersave", "cpupower"),
    (doctor.bandwidth(400e9), GREEN, "400.0 GB/s read: at most 32.3 tokens/s", ""),
    (doctor.bandwidth(40e9), YELLOW, "40.0 GB/s", "channel"),
    (doctor.gpu(["RTX"], [LINK], "13.0"), GREEN, "RTX, CUDA 13.0", ""),
    (doctor.gpu([], [], None), GREEN, "none", ""),
    (doctor.gpu([], [LINK], None), RED, "1 NVIDIA device", "no CUDA"),
    (doctor.gpu([], [LINK], "13.0"), RED, "1 NVIDIA device", "nvidia-smi"),
    (doctor.pcie(LINK), GREEN, "0000:01:00.0: 16 of 16 lanes, up to 32 GT/s", ""),
    (doctor.pcie(NARROW), YELLOW, "4 of 16 lanes", "slot"),
    (doctor.memlock(-1, True), GREEN, "unlimited", ""),
    (doctor.memlock(8 << 20, True), YELLOW, "0.01 GiB", "ulimit -l"),
    (doctor.memlock(8 << 20, False), GREEN, "without a GPU", ""),
    (doctor.python((3, 11)), GREEN, "Linux", ""),
    (doctor.python((3, 9)), RED, "Linux", "3.10 or newer"),
    (doctor.torch_version("2.13.0+cpu", "2.13.0"), GREEN, "2.13.0+cpu", ""),
    (doctor.torch_version("2.12.0", "2.13.0"), YELLOW, "2.12.0", "pip install torch==2.13.0"),
    (doctor.torch_version("2.12.0", None), GREEN, "2.12.0", ""),
]


@pytest.mark.parametrize(("check", "mark", "text", "remedy"), CHECKS)
def test_marks_and_remedies(check, mark, text, remedy):
    assert check.mark == mark and text in check.text and remedy in check.remedy
    assert bool(check.remedy) == (mark != GREEN) and re.fullmatch(r"$|[A-Z].*\.", check.remedy)


def tree(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def sysfs(root, cpu, **changes):
    device = "bus/pci/devices/0000:41:00.0"
    return tree(
        root,
        {
            "devices/system/cpu/online": "0-191",
            "devices/system/node/online": "1",
            "devices/system/node/node1/cpulist": f"{cpu}",
            f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": f"{cpu}",
            f"devices/system/cpu/cpu{cpu}/cpufreq/scaling_governor": "powersave",
            "kernel/mm/transparent_hugepage/enabled": "always madvise [never]",
            "fs/cgroup/memory.max": f"{GIB // 2}",
            f"{device}/vendor": "0x10de",
            f"{device}/class": "0x030000",
            f"{device}/current_link_speed": "2.5 GT/s PCIe",
            f"{device}/current_link_width": "8",
            f"{device}/max_link_speed": "32.0 GT/s PCIe",
            f"{device}/max_link_width": "16",
            "bus/pci/devices/0000:42:00.0/vendor": "0x8086",
        }
        | changes,
    )


def test_a_machine_of_another_kind(tmp_path):
    cpu = _C.physical_cores()[0]
    found = {c.name: c for c in doctor.examine(sysfs(tmp_path, cpu), measure=lambda: 250e9)}
    marks = {name: check.mark for name, check in found.items()}
    expected = ["ISA", "cores", "NUMA", "memory", "huge pages", "governor", "memory speed", "GPU", "PCIe", "memlock"]
    assert list(found) == [*expected, "Python", "torch", "extension"]
    yellow = {"cores", "memory", "huge pages", "governor", "PCIe"}
    assert yellow <= {name for name, mark in marks.items() if mark == YELLOW}
    assert "of 192" in found["cores"].text and found["NUMA"].text == "1 NUMA node (1)"
    assert found["PCIe"].text == "0000:41:00.0: 8 of 16 lanes, up to 32 GT/s each"
    assert marks["memory speed"] == GREEN and "250.0 GB/s" in found["memory speed"].text


def test_the_lines_the_json_and_the_exit_code(monkeypatch):
    monkeypatch.setattr(doctor, "read_bandwidth", lambda: 300e9)
    lines = CliRunner().invoke(app, ["doctor"])
    told = CliRunner().invoke(app, ["doctor", "--json"])
    checks = orjson.loads(told.output)
    assert len(lines.output.splitlines()) == len(checks) >= 12
    red = any(check["mark"] == RED for check in checks)
    assert lines.exit_code == told.exit_code == int(red)
    for line, check in zip(lines.output.splitlines(), checks, strict=True):
        assert line.startswith(f"{doctor.MARKS[check['mark']]} {check['name']}") and check["text"] in line
    monkeypatch.setattr(doctor, "isa", lambda: doctor.Check("ISA", RED, "none", "Buy [one]."))
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 1
    assert "Buy [one]." in CliRunner().invoke(app, ["doctor"]).output


def test_the_memory_is_read(monkeypatch):
    monkeypatch.setattr(doctor, "PROBE_BYTES", 64 << 20)
    monkeypatch.setattr(doctor, "PROBE_SECONDS", 0.1)
    assert 1e8 < doctor.read_bandwidth() < 1e13
