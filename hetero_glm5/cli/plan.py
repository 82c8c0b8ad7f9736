"""`hetero-glm5 plan`: does a model fit, what is where, how fast is it, which line launches it; without weights."""

from __future__ import annotations

import argparse
import inspect
import shlex
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console

from hetero_glm5 import hardware
from hetero_glm5.cli.fitting import Experts, Fit, Way, dense_reads, fit, missing, other_ways
from hetero_glm5.cli.rehearsal import config_data, rehearse
from hetero_glm5.config import EngineConfig, ServerConfig
from hetero_glm5.core import UserError
from hetero_glm5.flags import Flags, add_flags, flag, from_args, nearest_flag, to_args
from hetero_glm5.hardware import Hardware, NumaNode
from hetero_glm5.model_config import DEMO, ModelConfig, checkpoint_folder
from hetero_glm5.placement import outlook
from hetero_glm5.placement.memory import GIB

OTHERS, CONTEXT = (3 * GIB, GIB // 2), 32768  # what everybody else has of RAM and GPU memory; tokens of a useful pool
FLOPS_OF_A_CORE = 0.1e12


@dataclass(frozen=True)
class MachineFlags(Flags):
    """A machine that is not this one, in a data sheet's figures."""

    ram: float | None = flag(None, "GiB of memory; default: this machine's", at_least=1)
    ram_bandwidth: float | None = flag(
        None, "GB/s of all of it: channels x MT/s x 8 (2 x DDR5-5600: 90, 12 x DDR5-4800: 460)", at_least=1
    )
    cores: int | None = flag(None, "physical cores; default: this machine's", at_least=1)
    sockets: int = flag(1, "NUMA nodes that memory and cores are divided over", at_least=1)
    cpu_tflops: float | None = flag(None, "peak of all cores in TFLOP/s; default: 0.1 for each core", at_least=0.001)
    vram: float = flag(0.0, "GiB of GPU memory; 0 = no GPU", at_least=0)
    vram_bandwidth: float = flag(1000.0, "its GB/s", at_least=1)
    gpu_tflops: float = flag(150.0, "peak of the GPU in dense BF16 TFLOP/s", at_least=0.1)
    pcie: float = flag(25.0, "GB/s from memory to the GPU (4.0 x16: 25, 5.0 x16: 50)", at_least=0.1)
    disk: float = flag(5.0, "GB/s of the disk, which counts where experts stay in files", at_least=0.01)

    def machine(self) -> tuple[Hardware, outlook.Machine]:
        """What is there, and its rates."""
        if self.ram_bandwidth is None:
            raise UserError(
                "--ram-bandwidth is missing: decode is bounded by it. Give channels x MT/s x 8 bytes, such as 90 for 2 "
                "channels of DDR5-5600, or 460 for 12 of DDR5-4800."
            )
        here = hardware.probe(gpu=False)
        ram = here.ram_available if self.ram is None else max(int(self.ram * GIB) - OTHERS[0], GIB // 2)
        cores = self.cores or here.cores
        if cores < self.sockets:
            raise UserError(f"--cores is {cores}; {self.sockets} sockets need a core each. Raise it.")
        nodes = {i: NumaNode(cores // self.sockets, ram // self.sockets) for i in range(self.sockets)}
        gpu = f"a GPU with {self.vram:g} GiB" if self.vram else None
        free = max(int(self.vram * GIB) - OTHERS[1], 0)
        name = f"memory of {self.ram_bandwidth:g} GB/s" + (f", link of {self.pcie:g} GB/s" if gpu else "")
        tflops = cores * FLOPS_OF_A_CORE if self.cpu_tflops is None else self.cpu_tflops * 1e12
        device = (self.vram_bandwidth * 1e9, self.gpu_tflops * 1e12) if gpu else None
        rates = outlook.Machine(self.ram_bandwidth * 1e9, tflops, self.pcie * 1e9, self.disk * 1e9, device)
        return Hardware(name, nodes, ram, gpu, free), rates


@dataclass(frozen=True)
class Speed:
    """Tokens a second, the low end first, and how each end comes about."""

    decode: tuple[float, float]
    prefill: tuple[float, float]
    formulas: dict[str, str]


def plan(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Option("--model", "--model-path", help="folder with config.json (and an index), or demo")
    ] = DEMO,
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    measure: Annotated[bool, typer.Option(help="run parts of the model here for some seconds, for its speed")] = True,
    **machine: Any,
) -> None:
    """Say whether a model fits a machine, what is where, how fast it is, and the line that launches it.

    config.json is enough; of weights nothing is read. Every flag of the launch line may be given too, such as
    --kt-num-gpu-experts. Without flags about the machine it is this one, and its speed is measured. Exits with 1 if the
    model does not fit.
    """
    config, server = _launch_flags(ctx.args)
    folder, given = checkpoint_folder(model), MachineFlags(**machine)
    config, architecture = replace(config, model=folder), ModelConfig.load(folder)
    if given != MachineFlags():
        there, rates = given.machine()
    else:
        there, rates = hardware.probe(gpu=config.device != "cpu"), None
    experts = Experts.of(config, architecture)
    found: dict[str, Any] = {"model": model, "machine": _described(there)}
    chosen: Fit | None
    try:
        chosen = fit(config, architecture, experts, there)
        found["fits"] = True
    except UserError as error:
        asked = Way("as asked", config, experts, None)
        remedies, chosen = _remedies(asked, architecture, there)
        found |= {"fits": False, "error": str(error)} | remedies
    if chosen is not None:
        found |= _layout(chosen) | {"launch": _launch(chosen, server, model)}
        if rates is not None:
            found["speed"] = _speed(predicted(chosen, architecture, rates))
            found["notes"] += _room_note(chosen, architecture, experts, there, rates)
        elif measure:
            found["speed"] = _speed(measured(chosen))
            if chosen.memory.needs.mapped:
                found["notes"] += [
                    "the speed is that of experts in memory; those that are read from files take longer."
                ]
    if json:
        typer.echo(orjson.dumps(found, option=orjson.OPT_INDENT_2))
    else:
        _show(Console(), found)
    if not found["fits"]:
        raise typer.Exit(1)


def _launch_flags(words: list[str]) -> tuple[EngineConfig, ServerConfig]:
    """Those among the arguments."""
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False, add_help=False)
    add_flags(parser, EngineConfig, "engine")
    add_flags(parser, ServerConfig, "server")
    try:
        args, rest = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}.") from None
    if rest:
        known = [*parser._option_string_actions, *(f"--{f.name.replace('_', '-')}" for f in fields(MachineFlags))]
        raise UserError(nearest_flag(rest[0], known) if rest[0].startswith("-") else f"{rest[0]!r} belongs to no flag.")
    return from_args(EngineConfig, args), from_args(ServerConfig, args)


def predicted(chosen: Fit, model: ModelConfig, machine: outlook.Machine) -> Speed:
    """By the rates of a machine."""
    memory, settled = chosen.memory, chosen.settled
    if settled.device == "cpu":
        machine = replace(machine, gpu=None)
    needs, cached = memory.needs, 1.0
    if needs.mapped:
        beside = needs.dense + memory.kv_tokens * needs.kv_token if memory.limits.shared else 0
        free = memory.limits.host - needs.host_rest - beside
        cached = min(1.0, max(0, free) / (needs.host_experts * needs.expert))
    work = outlook.Work(
        dense=dense_reads(model, settled.dtype),
        itemsize=2 if settled.dtype == "bfloat16" else 4,
        layers=model.num_hidden_layers,
        moe_layers=len(model.moe_layers),
        experts=model.n_routed_experts,
        top_k=model.num_experts_per_tok,
        expert=needs.expert,
        method=settled.kt_method,
        bits=chosen.layout.bits_per_weight,
        share=chosen.share,
        in_memory=cached,
        divides=settled.divides_prefills,
    )
    tokens = settled.chunked_prefill_size
    low, high = (outlook.decode(machine, work, ends) for ends in (outlook.LOW, outlook.HIGH))
    slow, fast = (outlook.prefill(machine, work, ends, tokens) for ends in (outlook.LOW, outlook.HIGH))
    formulas = {
        "decode, low": low.formula,
        "decode, high": high.formula,
        "prefill, low": slow.formula,
        "prefill, high": fast.formula,
    }
    return Speed((1 / low.seconds, 1 / high.seconds), (tokens / slow.seconds, tokens / fast.seconds), formulas)


def measured(chosen: Fit) -> Speed:
    """By what parts of the model take on this machine."""
    decoded, computed, rows = rehearse(chosen.settled, config_data(chosen.config.model), chosen.layout, chosen.share)
    formulas = {"decode": decoded.formula, f"prefill of {rows} tokens": computed.formula}
    ends = [1 / max(decoded.steps), 1 / min(decoded.steps)]
    return Speed((ends[0], ends[1]), (rows / max(computed.steps), rows / min(computed.steps)), formulas)


def _speed(speed: Speed) -> dict[str, Any]:
    return {
        "decode_tokens_per_second": speed.decode,
        "prefill_tokens_per_second": speed.prefill,
        "formulas": speed.formulas,
    }


def _described(machine: Hardware) -> dict[str, Any]:
    return {
        "cpu": machine.cpu,
        "cores": machine.cores,
        "numa_nodes": len(machine.numa),
        "ram_available": machine.ram_available,
        "gpu": machine.gpu,
        "gpu_free": machine.gpu_free,
    }


def _layout(chosen: Fit) -> dict[str, Any]:
    needs, memory, settled = chosen.memory.needs, chosen.memory, chosen.settled
    return {
        "device": settled.device,
        "method": settled.kt_method,
        "bytes": {
            "dense weights": needs.dense,
            "KV pool": memory.kv_tokens * needs.kv_token,
            "device experts": needs.device_experts * needs.expert,
            "host experts": needs.host_blobs * needs.expert,
            "activations": needs.activations,
        },
        "mapped": needs.mapped,
        "device_experts": needs.device_experts,
        "host_experts": needs.host_experts,
        "kv_tokens": memory.kv_tokens,
        "context_length": chosen.context_length,
        "report": memory.report(),
        "notes": chosen.notes,
    }


def _launch(chosen: Fit, server: ServerConfig, model: str) -> list[str]:
    """The command lines that serve it."""
    engine = replace(chosen.config, model=model)
    server = replace(server, reasoning_parser="glm45", tool_call_parser="glm47")
    launch = shlex.join(["python", "-m", "hetero_glm5.launch_server", *to_args(engine), *to_args(server)])
    if chosen.pack_as is None:
        return [launch]
    pack = ["hetero-glm5", "quantize", model, str(engine.kt_weight_path), "--kt-method", chosen.pack_as]
    return [shlex.join(pack), launch]


def _remedies(asked: Way, model: ModelConfig, machine: Hardware) -> tuple[dict[str, Any], Fit | None]:
    """What is missing, and the first other way that fits; if none does, what the last and smallest would need."""
    short = missing(machine, lambda other: asked.fits(model, other))
    ways = list(other_ways(asked.config, asked.experts, machine.cuda))
    way = next((way for way in ways if way.fits(model, machine)), None)
    found: dict[str, Any] = {"missing_gib": short, "instead": None}
    if way is not None:
        return found | {"instead": {"way": way.phrase, "missing_gib": {}}}, way.fit(model, machine)
    least = missing(machine, lambda other: ways[-1].fits(model, other))
    if least:
        found["instead"] = {"way": ways[-1].phrase, "missing_gib": least}
    return found, None


def _room_note(
    chosen: Fit, model: ModelConfig, experts: Experts, machine: Hardware, rates: outlook.Machine
) -> list[str]:
    """What it would mean to fill the device with experts, if nothing was said about that."""
    if chosen.settled.device == "cpu" or chosen.share:
        return []
    best, low, high = None, 0, model.n_routed_experts + 1
    while high - low > 1:
        middle = (low + high) // 2
        more = replace(chosen.config, kt_num_gpu_experts=middle, max_total_tokens=CONTEXT, context_length=None)
        try:
            best, low = fit(more, model, experts, machine), middle
        except UserError:
            high = middle
    if best is None:
        return []
    slow, fast = predicted(best, model, rates).decode
    return [
        f"the device has room for {low} experts of each layer (--kt-num-gpu-experts {low}) beside {CONTEXT} tokens of "
        f"KV pool. With these decode is {slow:.3g} to {fast:.3g} tokens/s: this version unpacks them at each use."
    ]


def _show(console: Console, found: dict[str, Any]) -> None:
    def line(name: str, text: str, style: str = "") -> None:
        console.print(f"[bold]{name:<9}[/]", end="")
        console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    machine = found["machine"]
    memory = f"{machine['ram_available'] / GIB:.0f} GiB of RAM free"
    gpu = f", {machine['gpu']} ({machine['gpu_free'] / GIB:.1f} GiB free)" if machine["gpu"] else ", no GPU"
    line("machine", f"{machine['cpu']}, {machine['cores']} cores, {machine['numa_nodes']} NUMA node(s), {memory}{gpu}")
    if found["fits"]:
        line("fits", "yes", "green")
    else:
        line("fits", f"no. {found['error']}", "red")
        line("missing", _amounts(found["missing_gib"]) or "no memory would do; the flags do not fit together")
        other = found["instead"] or {"way": "nothing smaller fits this machine either", "missing_gib": {}}
        more = _amounts(other["missing_gib"])
        line("instead", other["way"] + (f", with {more} more than there is" if more else ""))
    if "bytes" not in found:
        return
    for text in found["report"]:
        line(*text.replace(" tiers:", ":").replace(" tier:", ":").split(": ", 1))
    line("KV", f"{found['kv_tokens']} tokens in the pool, contexts of up to {found['context_length']}")
    if "speed" in found:
        for name in ("decode", "prefill"):
            low, high = found["speed"][f"{name}_tokens_per_second"]
            line(name, f"{low:.3g} to {high:.3g} tokens/s")
        for name, formula in found["speed"]["formulas"].items():
            line("", f"{name}: {formula}", "dim")
    for note in found["notes"]:
        line("note", note)
    for command in found["launch"]:
        line("launch", command, "cyan")


def _amounts(gib: dict[str, int]) -> str:
    return " and ".join(f"{amount} GiB of {memory}" for memory, amount in gib.items())


def _with_machine_options(command: Any) -> Any:
    """`command` with an option for each field of MachineFlags in place of **machine."""
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    hints = inspect.get_annotations(MachineFlags, eval_str=True)
    for f in fields(MachineFlags):
        option = typer.Option(help=f.metadata["help"], rich_help_panel="A machine that is not this one")
        own.append(inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default,
                                     annotation=Annotated[hints[f.name], option]))  # fmt: skip
    command.__signature__ = signature.replace(parameters=own)
    command.__annotations__ = {p.name: p.annotation for p in own}
    return command


plan = _with_machine_options(plan)
