"""Topology from fixture trees that look like sysfs."""

import os

import pytest

from hetero_glm5 import _C


def sysfs(root, nodes: dict[int, str], cores: list[list[int]]) -> str:
    """nodes: id -> cpulist, as the kernel writes it. cores: the hardware threads of each core."""
    for node, cpus in nodes.items():
        directory = root / f"devices/system/node/node{node}"
        directory.mkdir(parents=True)
        (directory / "cpulist").write_text(cpus + "\n")
    for siblings in cores:
        for cpu in siblings:
            directory = root / f"devices/system/cpu/cpu{cpu}/topology"
            directory.mkdir(parents=True)
            (directory / "thread_siblings_list").write_text(",".join(map(str, siblings)) + "\n")
    cpus = sorted(cpu for siblings in cores for cpu in siblings)
    (root / "devices/system/cpu/online").write_text(f"{cpus[0]}-{cpus[-1]}\n")
    return str(root)


SMT8 = [[i, i + 8] for i in range(8)]  # 8 cores, 16 threads, numbered as Linux does


def node(id, cpus, cores):
    return {"id": id, "cpus": list(cpus), "physical_cores": list(cores)}


def test_two_nodes(tmp_path):
    root = sysfs(tmp_path, {0: "0-3,8-11", 1: "4-7,12-15"}, SMT8)
    assert _C.topology(root, list(range(16))) == [
        node(0, [0, 1, 2, 3, 8, 9, 10, 11], range(4)),
        node(1, [4, 5, 6, 7, 12, 13, 14, 15], range(4, 8)),
    ]


def test_node_ids_with_gaps_and_two_digits(tmp_path):
    root = sysfs(tmp_path, {10: "4-7,12-15", 3: "0-3,8-11"}, SMT8)
    assert [n["id"] for n in _C.topology(root, list(range(16)))] == [3, 10]


def test_sub_numa_clusters_are_nodes(tmp_path):
    root = sysfs(tmp_path, {i: f"{2 * i}-{2 * i + 1},{2 * i + 8}-{2 * i + 9}" for i in range(4)}, SMT8)
    assert [n["physical_cores"] for n in _C.topology(root, list(range(16)))] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_memory_only_node_is_left_out(tmp_path):
    root = sysfs(tmp_path, {0: "0-15", 1: ""}, SMT8)
    assert [n["id"] for n in _C.topology(root, list(range(16)))] == [0]


def test_one_node_and_no_node_directory(tmp_path):
    one = sysfs(tmp_path / "one", {0: "0-15"}, SMT8)
    none = sysfs(tmp_path / "none", {}, SMT8)
    assert _C.topology(one, list(range(16))) == _C.topology(none, list(range(16))) == [node(0, range(16), range(8))]


def test_cpuset_of_three_cores(tmp_path):
    root = sysfs(tmp_path, {0: "0-3,8-11", 1: "4-7,12-15"}, SMT8)
    # core 2 by both threads, core 3 by its second thread only, core 5 on the other node
    assert _C.topology(root, [2, 5, 10, 11]) == [node(0, [2, 10, 11], [2, 11]), node(1, [5], [5])]


def test_bad_trees_are_refused(tmp_path):
    root = sysfs(tmp_path / "far", {0: "0-15"}, SMT8)
    with pytest.raises(ValueError, match="none of the 1 CPUs"):
        _C.topology(root, [99])
    root = sysfs(tmp_path / "odd", {0: "0-x"}, SMT8)
    with pytest.raises(ValueError, match="'0-x' is not a list of CPUs"):
        _C.topology(root, [0])


def test_this_machine():
    nodes = _C.topology()
    assert sorted(cpu for n in nodes for cpu in n["cpus"]) == sorted(os.sched_getaffinity(0))
    assert _C.physical_cores() == [core for n in nodes for core in n["physical_cores"]]
