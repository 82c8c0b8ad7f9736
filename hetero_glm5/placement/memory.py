"""Bytes by tier: what the model needs, what the machine has, how many KV tokens fit. Refuses with the arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from hetero_glm5.core import UserError

GIB = 1 << 30
HOST_FRACTION = 0.95


@dataclass(frozen=True)
class Needs:
    """What the model takes, in bytes (and pieces)."""

    dense: int  # weights outside routed experts
    expert: int  # one packed expert
    device_experts: int  # how many on the device
    host_experts: int  # how many on the host
    activations: int  # the largest step's temporaries on the device
    kv_token: int  # cached bytes of one token over all layers
    mapped: bool = False  # the host experts stay in files

    @property
    def host_bytes(self) -> int:
        """Memory that the host experts occupy."""
        return 0 if self.mapped else self.host_experts * self.expert


@dataclass(frozen=True)
class Limits:
    """What the machine offers, in bytes. `device` and `host` are the same memory when `shared`. HOST_FRACTION of `host`
    may hold experts: the rest is for loading, scratch and everybody else."""

    device: int
    host: int
    shared: bool
    fraction: float  # --mem-fraction-static
    nodes: tuple[int, ...] = ()  # what each NUMA node has, if the host experts are divided over nodes


@dataclass(frozen=True)
class MemoryPlan:
    needs: Needs
    limits: Limits
    kv_tokens: int

    def report(self) -> list[str]:
        """One line for each tier, for the start log."""
        n = self.needs
        device = [
            f"dense weights {_gib(n.dense)}",
            f"{n.device_experts} experts {_gib(n.device_experts * n.expert)}",
            f"activations {_gib(n.activations)}",
            f"KV pool {_gib(self.kv_tokens * n.kv_token)} ({self.kv_tokens} tokens x {n.kv_token} B)",
        ]
        host = f"{n.host_experts} experts {_gib(n.host_experts * n.expert)}" + (", in files" if n.mapped else "")
        return ["device tier: " + ", ".join(device), f"host tier: {host}"]


def host_experts_fit(needs: Needs, limits: Limits, *, tokens: int, page: int) -> bool:
    """Whether the host experts can be in memory, beside a KV pool of `tokens` and the rest where they share it."""
    if _share_of_a_node(needs, limits) > min(limits.nodes, default=0) * HOST_FRACTION:
        return False
    if not limits.shared:
        return needs.host_bytes <= limits.host * HOST_FRACTION
    return _fixed(needs, limits) + -(-tokens // page) * page * needs.kv_token <= _budget(limits)


def plan_memory(needs: Needs, limits: Limits, *, wanted_tokens: int | None, most_tokens: int, page: int) -> MemoryPlan:
    """Settles the size of the KV pool: `wanted_tokens`, or what is left, at most `most_tokens`; whole pages.

    Raises UserError when the weights or the wanted pool do not fit.
    """
    if not limits.shared and needs.host_bytes > limits.host * HOST_FRACTION:
        raise UserError(
            f"host memory: {needs.host_experts} experts x {_gib(needs.expert)} = {_gib(needs.host_bytes)}, but only "
            f"{HOST_FRACTION} of {_gib(limits.host)} available may hold them. Use a smaller --kt-method or put more "
            "experts on the device."
        )
    share, smallest = _share_of_a_node(needs, limits), min(limits.nodes, default=0)
    if share > smallest * HOST_FRACTION:
        raise UserError(
            f"host memory: {needs.host_experts} experts x {_gib(needs.expert)}, divided over {len(limits.nodes)} NUMA "
            f"node(s), put {_gib(share)} on each, but only {HOST_FRACTION} of {_gib(smallest)} available on one of "
            "them may hold experts. Use a smaller --kt-method, other --kt-numa-nodes, or put more experts on the "
            "device."
        )
    budget, fixed = _budget(limits), _fixed(needs, limits)
    left = budget - fixed
    tokens = min(left // needs.kv_token, most_tokens) if wanted_tokens is None else wanted_tokens
    tokens = tokens // page * page if wanted_tokens is None else -(-tokens // page) * page
    if tokens < page or tokens * needs.kv_token > left:
        wanted = max(tokens, page)
        host = f"{needs.host_experts} host experts {_gib(needs.host_bytes)}"
        parts = [
            f"dense weights {_gib(needs.dense)}",
            f"{needs.device_experts} device experts {_gib(needs.device_experts * needs.expert)}",
            *([host] if limits.shared and not needs.mapped else []),
            f"activations {_gib(needs.activations)}",
            f"KV pool {_gib(wanted * needs.kv_token)} ({wanted} tokens x {needs.kv_token} B)",
        ]
        raise UserError(
            f"memory: {' + '.join(parts)} = {_gib(fixed + wanted * needs.kv_token)}, but the budget is {_gib(budget)} "
            f"({limits.fraction} of {_gib(limits.device)}). Lower --max-total-tokens (one page at least, --page-size "
            f"{page}), --chunked-prefill-size or --kt-num-gpu-experts, or raise --mem-fraction-static."
        )
    return MemoryPlan(needs, limits, tokens)


def _share_of_a_node(needs: Needs, limits: Limits) -> int:
    return needs.host_bytes // len(limits.nodes) if limits.nodes else 0


def _budget(limits: Limits) -> int:
    return int(limits.device * limits.fraction)


def _fixed(needs: Needs, limits: Limits) -> int:
    """Bytes of the budget that the KV pool cannot have."""
    device = needs.dense + needs.device_experts * needs.expert + needs.activations
    return device + (needs.host_bytes if limits.shared else 0)


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB // 100 else f"{size / (1 << 20):.2f} MiB"
