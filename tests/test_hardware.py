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
