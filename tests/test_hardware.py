import psutil

from hetero_glm5 import _C, hardware

MEMINFO = """Node 3 MemTotal:       24684096 kB
Node 3 MemFree:            1000 kB
Node 3 MemUsed:        19644936 kB
Node 3 Active(anon):       1072 kB
Node 3 Active(file):        200 kB
Node 3 Inactive(file):       30 kB
Node 3 FilePages:      16675760 kB
Node 3 HugePages_Total:     5
"""


def test_memory_of_a_node(tmp_path):
    folder = tmp_path / "devices/system/node/node3"
    folder.mkdir(parents=True)
    (folder / "meminfo").write_text(MEMINFO)
    assert hardware.node_ram(3, tmp_path) == 1230 << 10
    assert 0 < hardware.node_ram(4, tmp_path) <= psutil.virtual_memory().total  # no such file: the machine's


def test_this_machine():
    machine = hardware.probe(gpu=False)
    assert machine.cores == len(_C.physical_cores()) and list(machine.numa) == [n["id"] for n in _C.topology()]
    assert all(0 < node.ram_available <= psutil.virtual_memory().total for node in machine.numa.values())
    assert machine.cpu and not machine.cuda


def test_what_sysfs_does_not_say(tmp_path):
    assert hardware.huge_pages(tmp_path) == "never" and hardware.governors([0], tmp_path) == set()
    assert hardware.online_cpus(tmp_path) == 0 and hardware.memory_limit(tmp_path) is None
    assert hardware.pci_links(tmp_path) == []


def test_what_sysfs_says(tmp_path):
    device = tmp_path / "bus/pci/devices/0000:01:00.0"
    for name, text in {
        "kernel/mm/transparent_hugepage/enabled": "always [madvise] never",
        "devices/system/cpu/online": "0-3,8,10-11",
        "fs/cgroup/memory.max": "max",
        "devices/system/cpu/cpu1/cpufreq/scaling_governor": "powersave",
        f"{device}/vendor": "0x10de",
        f"{device}/class": "0x030200",
        f"{device}/current_link_speed": "16.0 GT/s PCIe",
        f"{device}/current_link_width": "8",
        f"{device}/max_link_speed": "Unknown",
        f"{device}/max_link_width": "16",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert hardware.huge_pages(tmp_path) == "madvise" and hardware.online_cpus(tmp_path) == 7
    assert hardware.governors([0, 1], tmp_path) == {"powersave"} and hardware.memory_limit(tmp_path) is None
    assert hardware.pci_links(tmp_path) == [hardware.PciLink("0000:01:00.0", 16.0, 8, 0.0, 16)]
