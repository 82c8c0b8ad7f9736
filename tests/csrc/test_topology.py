"""Topology, and which threads it puts where, from fixture trees that look like sysfs."""

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


def topology(root):
    return _C.topology(root, list(range(16)))


def groups(root, nodes, threads, cpus=range(16)):
    """[(node, CPUs of its threads)]"""
    return _C.testing.group_threads(root, list(cpus), nodes, threads)


def test_two_nodes(tmp_path):
    root = sysfs(tmp_path, {0: "0-3,8-11", 1: "4-7,12-15"}, SMT8)
    assert topology(root) == [
        node(0, [0, 1, 2, 3, 8, 9, 10, 11], range(4)),
        node(1, [4, 5, 6, 7, 12, 13, 14, 15], range(4, 8)),
    ]
    assert groups(root, [0, 1], 0) == groups(root, [0, 1], 8) == [(0, [0, 1, 2, 3]), (1, [4, 5, 6, 7])]
    assert groups(root, [0, 1], 5) == [(0, [0, 1, 2]), (1, [4, 5])]
    assert groups(root, [1, 0], 2) == [(1, [4]), (0, [0])]
    assert groups(root, [1], 0) == [(1, [4, 5, 6, 7])]
    assert groups(root, [], 0) == [(-1, list(range(8)))]
    assert groups(root, [], 3) == [(-1, [0, 1, 2])]


def test_more_threads_than_cores_are_not_pinned(tmp_path):
    root = sysfs(tmp_path, {0: "0-3,8-11", 1: "4-7,12-15"}, SMT8)
    assert groups(root, [0, 1], 9) == [(0, [-1] * 5), (1, [-1] * 4)]
    assert groups(root, [1], 5) == [(1, [-1] * 5)]
    assert groups(root, [], 9) == [(-1, [-1] * 9)]


def test_a_node_listed_twice_shares_its_cores(tmp_path):
    root = sysfs(tmp_path, {0: "0-3,8-11", 1: "4-7,12-15"}, SMT8)
    assert groups(root, [0, 0], 0) == [(0, [0, 2]), (0, [1, 3])]
    assert groups(root, [0, 1, 0], 5) == [(0, [0, 2]), (1, [4, 5]), (0, [1])]


def test_threads_that_no_node_can_take_are_refused(tmp_path):
    root = sysfs(tmp_path, {0: "0-3,8-11", 1: "4-7,12-15"}, SMT8)
    with pytest.raises(ValueError, match="at least 2 threads, one for each NUMA node, not 1"):
        groups(root, [0, 1], 1)
    with pytest.raises(ValueError, match="no CPU of NUMA node 2"):
        groups(root, [0, 2], 2)
    with pytest.raises(ValueError, match="no CPU of NUMA node 1"):
        groups(root, [0, 1], 2, cpus=[0, 1])


def test_node_ids_with_gaps_and_two_digits(tmp_path):
    root = sysfs(tmp_path, {10: "4-7,12-15", 3: "0-3,8-11"}, SMT8)
    assert [n["id"] for n in topology(root)] == [3, 10]
    assert groups(root, [3, 10], 4) == [(3, [0, 1]), (10, [4, 5])]


def test_odd_node_ids_of_interleaved_cpus(tmp_path):
    """CPUs dealt out to the sockets in turn, as some firmware does."""
    root = sysfs(tmp_path, {1: "0,2,4,6,8,10,12,14", 3: "1,3,5,7,9,11,13,15"}, SMT8)
    assert topology(root) == [node(1, range(0, 16, 2), range(0, 8, 2)), node(3, range(1, 16, 2), range(1, 8, 2))]
    assert groups(root, [1, 3], 0) == [(1, [0, 2, 4, 6]), (3, [1, 3, 5, 7])]


def test_sub_numa_clusters_are_nodes(tmp_path):
    root = sysfs(tmp_path, {i: f"{2 * i}-{2 * i + 1},{2 * i + 8}-{2 * i + 9}" for i in range(4)}, SMT8)
    assert [n["physical_cores"] for n in topology(root)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert groups(root, [0, 1, 2, 3], 6) == [(0, [0, 1]), (1, [2, 3]), (2, [4]), (3, [6])]
    assert groups(root, [0, 1], 0) == [(0, [0, 1]), (1, [2, 3])]


def test_memory_only_node_is_left_out(tmp_path):
    root = sysfs(tmp_path, {0: "0-7", 1: "", 2: "8-15"}, [[i] for i in range(16)])
    assert [n["id"] for n in topology(root)] == [0, 2]
    assert groups(root, [0, 2], 4) == [(0, [0, 1]), (2, [8, 9])]
    with pytest.raises(ValueError, match="no CPU of NUMA node 1"):
        groups(root, [1], 1)


def test_one_node_and_no_node_directory(tmp_path):
    one = sysfs(tmp_path / "one", {0: "0-15"}, SMT8)
    none = sysfs(tmp_path / "none", {}, SMT8)
    assert topology(one) == topology(none) == [node(0, range(16), range(8))]
    assert groups(one, [0], 0) == groups(none, [0], 0) == [(0, list(range(8)))]


def test_siblings_side_by_side(tmp_path):
    root = sysfs(tmp_path, {0: "0-7", 1: "8-15"}, [[i, i + 1] for i in range(0, 16, 2)])
    assert topology(root) == [node(0, range(8), range(0, 8, 2)), node(1, range(8, 16), range(8, 16, 2))]
    assert groups(root, [0, 1], 6) == [(0, [0, 2, 4]), (1, [8, 10, 12])]


def test_no_siblings(tmp_path):
    root = sysfs(tmp_path, {0: "0-15"}, [[i] for i in range(16)])
    assert topology(root) == [node(0, range(16), range(16))]
    assert groups(root, [], 0) == [(-1, list(range(16)))]


def test_cpuset_of_three_cores(tmp_path):
    root = sysfs(tmp_path, {0: "0-3,8-11", 1: "4-7,12-15"}, SMT8)
    # core 2 by both threads, core 3 by its second thread only, core 5 on the other node
    few = [2, 5, 10, 11]
    assert _C.topology(root, few) == [node(0, [2, 10, 11], [2, 11]), node(1, [5], [5])]
    assert groups(root, [0, 1], 0, few) == [(0, [2, 11]), (1, [5])]
    assert groups(root, [0, 1], 2, few) == [(0, [2]), (1, [5])]
    assert groups(root, [1, 0], 3, few) == [(1, [5]), (0, [2, 11])]
    assert groups(root, [0, 1], 4, few) == [(0, [-1, -1]), (1, [-1, -1])]


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
    assert _C.binds_memory(nodes[0]["id"]) in (True, False) and not _C.binds_memory(1000)
    assert _C.physical_cores() == [core for n in nodes for core in n["physical_cores"]]
