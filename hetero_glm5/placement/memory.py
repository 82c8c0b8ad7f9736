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
    copies: bool = False  # experts move, so those on the device keep their place on the host
    staging: int = 0  # further device slots, through which a divided prefill streams experts
    pinned: int = 0  # host memory for the rows of the host's calls
    kept_pages: int = 0  # host memory for pages of the KV pool that may be used again

    @property
    def host_rest(self) -> int:
        """Bytes of host memory beside the experts."""
        return self.pinned + self.kept_pages

    @property
    def host_blobs(self) -> int:
        """Experts that the host has."""
        return self.host_experts + (self.device_experts if self.copies else 0)

    @property
    def host_bytes(self) -> int:
        """Memory that they occupy."""
        return 0 if self.mapped else self.host_blobs * self.expert


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
        n, limits = self.needs, self.limits
        pool = self.kv_tokens * n.kv_token
        used = _fixed(n, limits) + pool
        device = [*_device_parts(n), f"KV pool {_gib(pool)} ({self.kv_tokens} tokens x {n.kv_token} B)"]
        host = [f"{n.host_blobs} experts {_gib(n.host_blobs * n.expert)}" + (", in files" if n.mapped else "")]
        if n.copies:
            host.append(f"{n.device_experts} of them on the device too")
        if n.pinned:
            host.append(f"pinned rows {_gib(n.pinned)}")
        if n.kept_pages:
            host.append(f"kept KV pages {_gib(n.kept_pages)}")
        total = f"{_gib(used)} of {_gib(_budget(limits))} ({limits.fraction} of {_gib(limits.device)})"
        if limits.shared:
            return ["device tier: " + ", ".join(device), "host tier: " + ", ".join(host), f"both tiers: {total}"]
        occupied = f"{_gib(n.host_bytes + n.host_rest)} of {_gib(limits.host)}"
        return [f"device tier: {', '.join(device)}; {total}", f"host tier: {', '.join(host)}; {occupied}"]


def host_experts_fit(needs: Needs, limits: Limits, *, tokens: int, page: int) -> bool:
    """Whether the host experts can be in memory, beside a KV pool of `tokens` and the rest where they share it."""
    if _share_of_a_node(needs, limits) > min(limits.nodes, default=0) * HOST_FRACTION:
        return False
    if not limits.shared:
        return needs.host_bytes + needs.host_rest <= limits.host * HOST_FRACTION
    return _fixed(needs, limits) + -(-tokens // page) * page * needs.kv_token <= _budget(limits)


def plan_memory(needs: Needs, limits: Limits, *, wanted_tokens: int | None, most_tokens: int, page: int) -> MemoryPlan:
    """Settles the size of the KV pool: `wanted_tokens`, or what is left, at most `most_tokens`; whole pages.

    Raises UserError when the weights or the wanted pool do not fit.
    """
    room = max(int(limits.host * HOST_FRACTION) - needs.host_rest, 0)
    if not limits.shared and needs.host_bytes > room:
        rest = f", less {_gib(needs.host_rest)} of pinned rows and kept KV pages," if needs.host_rest else ""
        raise UserError(
            f"host memory: {_host_experts(needs)} = {_gib(needs.host_bytes)}, but only {HOST_FRACTION} of "
            f"{_gib(limits.host)} available{rest} may hold them, {_gib(room // needs.host_blobs)} for each. "
            f"{_host_remedy(needs)}"
        )
    share, smallest = _share_of_a_node(needs, limits), min(limits.nodes, default=0)
    if share > smallest * HOST_FRACTION:
        raise UserError(
            f"host memory: {_host_experts(needs)}, divided over {len(limits.nodes)} NUMA node(s), put {_gib(share)} on "
            f"each, but only {HOST_FRACTION} of {_gib(smallest)} available on one of them may hold experts. "
            f"{_host_remedy(needs)} Other --kt-numa-nodes may do as well."
        )
    budget, fixed = _budget(limits), _fixed(needs, limits)
    left = budget - fixed
    tokens = min(left // needs.kv_token, most_tokens) if wanted_tokens is None else wanted_tokens
    tokens = tokens // page * page if wanted_tokens is None else -(-tokens // page) * page
    if tokens < page or tokens * needs.kv_token > left:
        wanted = max(tokens, page)
        host = f"{needs.host_blobs} host experts {_gib(needs.host_bytes)}"
        parts = [
            *_device_parts(needs),
            *([host] if limits.shared and not needs.mapped else []),
            *([f"kept KV pages {_gib(needs.kept_pages)}"] if limits.shared and needs.kept_pages else []),
            f"KV pool {_gib(wanted * needs.kv_token)} ({wanted} tokens x {needs.kv_token} B)",
        ]
        raise UserError(
            f"memory: {' + '.join(parts)} = {_gib(fixed + wanted * needs.kv_token)}, but the budget is {_gib(budget)} "
            f"({limits.fraction} of {_gib(limits.device)}). {_device_remedy(needs, limits, page)}"
        )
    return MemoryPlan(needs, limits, tokens)


def _share_of_a_node(needs: Needs, limits: Limits) -> int:
    return needs.host_bytes // len(limits.nodes) if limits.nodes else 0


def _budget(limits: Limits) -> int:
    return int(limits.device * limits.fraction)


def _fixed(needs: Needs, limits: Limits) -> int:
    """Bytes of the budget that the KV pool cannot have."""
    device = needs.dense + (needs.device_experts + needs.staging) * needs.expert + needs.activations
    return device + (needs.host_bytes + needs.host_rest if limits.shared else 0)


def _device_parts(needs: Needs) -> list[str]:
    return [
        f"dense weights {_gib(needs.dense)}",
        f"{needs.device_experts} device experts {_gib(needs.device_experts * needs.expert)}",
        *([f"{needs.staging} staging slots {_gib(needs.staging * needs.expert)}"] if needs.staging else []),
        f"activations {_gib(needs.activations)}",
    ]


def _host_experts(needs: Needs) -> str:
    copies = f" (the {needs.device_experts} on the device keep theirs, because experts move)" if needs.copies else ""
    return f"{needs.host_blobs} experts x {_gib(needs.expert)}{copies}"


def _host_remedy(needs: Needs) -> str:
    if needs.copies:
        moves = "--kt-enable-dynamic-expert-update and --kt-gpu-prefill-token-threshold"
        return f"Use a smaller --kt-method, or let no expert move: leave out {moves}."
    return (
        "Use a smaller --kt-method, put more experts on the device, or leave a packed store in its files "
        "(--kt-weight-mode mmap)."
    )


def _device_remedy(needs: Needs, limits: Limits, page: int) -> str:
    if needs.dense + page * needs.kv_token >= limits.device:
        other = "a machine with more memory" if limits.shared else "a device with more memory, or --device cpu"
        return f"The dense weights alone leave no room: use {other}."
    return (
        f"Lower --max-total-tokens (one page at least, --page-size {page}), --chunked-prefill-size or "
        "--kt-num-gpu-experts, or raise --mem-fraction-static."
    )


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB // 4 else f"{size / (1 << 20):.2f} MiB"
