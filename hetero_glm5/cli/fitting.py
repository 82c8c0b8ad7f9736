"""Whether a model fits a machine, from its config.json and tensor names alone: the engine's own arithmetic, and, where
it refuses, what is missing and what would fit instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hetero_glm5.config import EngineConfig
from hetero_glm5.core import UserError
from hetero_glm5.engine import sizing
from hetero_glm5.engine.residency import starting_slots
from hetero_glm5.hardware import Hardware, NumaNode
from hetero_glm5.model_config import ModelConfig, int4_scheme, read_json
from hetero_glm5.placement.memory import GIB, MemoryPlan
from hetero_glm5.weights.checkpoint import Checkpoint, Entry, read_header
from hetero_glm5.weights.expert_source import checkpoint_layout
from hetero_glm5.weights.expert_store import ExpertStore, is_store
from hetero_glm5.weights.load import dense_bytes
from hetero_glm5.weights.names import SCALE_SUFFIX, expert_tensors, int4_tensors
from hetero_glm5.weights.quantize import ExpertLayout

MOST_GIB = 1 << 15  # of memory that is tried
MAPPED_POOL = 65536  # tokens, where experts stay in files: the rest of memory is to hold what was read of them
PACKED = ("INT8", "INT4")  # what to pack experts as, if they are too large, the best first


class NamedTensors(Checkpoint):
    """A checkpoint of which only the names are known: from the index, from model.safetensors, or, with neither, as
    config.json's quantization_config has them. Nothing can be read from it."""

    def __init__(self, folder: Path, model: ModelConfig):
        self.folder, self.int4 = folder, int4_scheme(folder)
        self.entries = dict.fromkeys(self._names(model), Entry(folder, "", (), 0, 0))

    def _names(self, model: ModelConfig) -> list[str]:
        index, single = self.folder / "model.safetensors.index.json", self.folder / "model.safetensors"
        if index.exists():
            return list(read_json(index, f"cannot read {index}").get("weight_map", {}))
        if single.exists():
            return list(read_header(single)[0])
        routed = routed_names(model)
        if self.int4 is not None:
            return [part for name in routed for part in int4_tensors(name, (1, 1), self.int4)]
        path = self.folder / "config.json"
        quantised = read_json(path, f"cannot read {path}").get("quantization_config") is not None
        return routed + [name + SCALE_SUFFIX for name in routed if quantised]


@dataclass(frozen=True)
class Experts:
    """What is known of the routed experts before they are read. packed_as: of a packed store; `layout` of a method."""

    quantised_as: str
    packed_as: str | None
    layout: Callable[[str], ExpertLayout]

    @staticmethod
    def of(config: EngineConfig, model: ModelConfig) -> Experts:
        path = Path(config.kt_weight_path or config.model)
        if is_store(path):
            layout = ExpertStore(path).layout
            return Experts("", layout.method, lambda method: layout)
        names = NamedTensors(path, model)
        quantised = names.common_method(routed_names(model))
        return Experts(quantised, None, lambda method: checkpoint_layout(names, model, method))

    def packed(self, method: str) -> Experts:
        """The same in a store of that method."""
        return Experts("", method, self.layout)


@dataclass(frozen=True)
class Fit:
    """A model on a machine. `settled`: what the engine makes of `config`, the flags to launch with."""

    config: EngineConfig
    settled: EngineConfig
    memory: MemoryPlan
    context_length: int
    layout: ExpertLayout
    notes: list[str]
    pack_as: str | None = None  # the experts are in a store that is still to be made, of this method

    @property
    def share(self) -> float:
        """Of the routed experts, that on the device."""
        needs = self.memory.needs
        return needs.device_experts / (needs.device_experts + needs.host_experts)


def fit(
    config: EngineConfig, model: ModelConfig, experts: Experts, machine: Hardware, pack_as: str | None = None
) -> Fit:
    """Raises UserError where the engine would."""
    settled, notes = config.resolve(
        model,
        cuda=machine.cuda,
        node_cores={id: node.cores for id, node in machine.numa.items()},
        packed_as=experts.packed_as,
        quantised_as=experts.quantised_as,
    )
    layout = experts.layout(settled.kt_method)
    on_device = int(starting_slots(settled, model).max()) + 1
    mappable = experts.packed_as is not None
    memory = sizing.plan(settled, model, layout, machine, on_device, mappable=mappable)
    length = sizing.context_length(settled, model, memory.kv_tokens)
    return Fit(config, settled, memory, length, layout, notes, pack_as)


def missing(machine: Hardware, fits: Callable[[Hardware], bool]) -> dict[str, int]:
    """How many GiB more it takes of RAM and of GPU memory, each if there were enough of the other; without those of
    which there is enough. Empty if no memory helps."""
    short = {}
    kinds = {"RAM": _with_ram, "GPU memory": _with_gpu_memory} if machine.cuda else {"RAM": _with_ram}
    for name, larger in kinds.items():
        rest = machine
        for other in kinds.keys() - {name}:
            rest = kinds[other](rest, MOST_GIB * GIB)
        if fits(rest) or not fits(larger(rest, MOST_GIB * GIB)):
            continue
        low, high = 0, MOST_GIB
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(larger(rest, middle * GIB)) else (middle, high)
        short[name] = high
    return short


def _with_ram(machine: Hardware, more: int) -> Hardware:
    each = more // len(machine.numa)
    nodes = {id: NumaNode(node.cores, node.ram_available + each) for id, node in machine.numa.items()}
    return replace(machine, numa=nodes, ram_available=machine.ram_available + more)


def _with_gpu_memory(machine: Hardware, more: int) -> Hardware:
    return replace(machine, gpu_free=machine.gpu_free + more)


@dataclass(frozen=True)
class Way:
    """A way to serve the model, with a phrase that names it. pack_as: of a store that is to be made first."""

    phrase: str
    config: EngineConfig
    experts: Experts
    pack_as: str | None

    def fit(self, model: ModelConfig, machine: Hardware) -> Fit:
        return fit(self.config, model, self.experts, machine, self.pack_as)

    def fits(self, model: ModelConfig, machine: Hardware) -> bool:
        try:
            self.fit(model, machine)
        except UserError:
            return False
        return True


def other_ways(config: EngineConfig, experts: Experts, gpu: bool) -> Iterator[Way]:
    """With less and less memory: the least change first. gpu: whether the machine has one."""
    fewer = replace(
        config,
        kt_num_gpu_experts=0,
        kt_gpu_experts_ratio=None,
        kt_enable_dynamic_expert_update=False,
        kt_gpu_prefill_token_threshold="0",
    )
    name = Path(config.model).absolute().name
    for device in ("cuda", "cpu") if gpu and config.device != "cpu" else ("cpu",):
        where = ", attention on the CPU" if device == "cpu" and gpu else ""
        here = replace(fewer, device=device)
        yield Way("no GPU" if where else "no experts on the device", here, experts, None)
        for method in PACKED:
            store = replace(here, kt_weight_path=f"{name}-{method}", kt_method="auto", kt_weight_mode="ram")
            yield Way(f"experts in {method}{where}", store, experts.packed(method), method)
        mapped = replace(store, kt_weight_mode="mmap", max_total_tokens=config.max_total_tokens or MAPPED_POOL)
        phrase = f"experts in {method} in a store that stays on disk (mmap){where}"
        yield Way(phrase, mapped, experts.packed(method), method)


def routed_names(model: ModelConfig) -> list[str]:
    """The weights of all routed experts, without the MTP layer's."""
    return [name for layer in model.moe_layers for name in expert_tensors(model, layer)]


def dense_reads(model: ModelConfig, dtype: str) -> int:
    """Bytes outside the routed experts that one decoded token reads: all but the embedding, of which it reads a row."""
    kind = getattr(torch, dtype)
    return dense_bytes(model, kind) - model.vocab_size * model.hidden_size * kind.itemsize
