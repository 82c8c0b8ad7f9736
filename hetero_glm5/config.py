"""How to run a model: EngineConfig and ServerConfig, one field = one flag.

Configs are frozen; `EngineConfig.resolve` settles every "auto" and returns a new one. A value that cannot work is one
sentence that names it, the limit and the remedy. This is the only file that touches os.environ.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hetero_glm5.flags import ConfigError, Flags, flag
from hetero_glm5.model_config import ModelConfig


def bound_openmp_spin() -> None:
    """Lets torch's OpenMP threads sleep soon after each parallel region. By default they spin for milliseconds on the
    cores that the expert threads need next: those then reach 65 % of the memory bandwidth instead of 93 % (2 cores,
    BF16, GLM-5's shapes). Works if torch is not imported yet; what the user has set stays."""
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


KT_METHODS = {  # --kt-method, under this project's name and under KTransformers' names
    "auto": "auto",
    "FP32": "FP32",
    "BF16": "BF16",
    "FP8": "FP8",
    "FP8_BLOCK": "FP8",
    "INT8": "INT8",
    "AMXINT8": "INT8",
    "MOE_INT8": "INT8",
    "INT4": "INT4",
    "AMXINT4": "INT4",
    "RAWINT4": "INT4",
    "GPTQ_INT4": "INT4",
}
PLACEMENTS = ("uniform", "front-loading", "random", "frequency")
ATTENTION_BACKENDS = ("auto", "torch", "triton", "flashinfer", "fa3", "flashmla", "dsa", "nsa")
KV_DTYPES = {"auto": "auto", "bf16": "bfloat16", "bfloat16": "bfloat16", "float32": "float32", "fp8_e4m3": "fp8_e4m3"}
DRAFT_DEPTH, KV_DISK_GIB = 3, 64


@dataclass(frozen=True)
class EngineConfig(Flags):
    """How to run a model. One field = one flag of the launch script and one keyword of LLM()."""

    model: str = flag(
        "", "checkpoint folder in Hugging Face format, or demo: the packaged model", names="--model --model-path"
    )
    device: str = flag("auto", "where attention and device experts run", choices=("auto", "cuda", "cpu"))
    dtype: str = flag("bfloat16", "compute and weight type outside the experts", choices=("bfloat16", "float32"))
    trust_remote_code: bool = flag(False, "accepted; nothing from a checkpoint is ever executed")
    latent_norm_eps: float | None = flag(
        None, "epsilon of the q and kv latent norms; default: the model's rms_norm_eps", at_least=0
    )

    kt_weight_path: str | None = flag(
        None, "where the routed experts are: a packed store (hetero-glm5 quantize) or a checkpoint; default: --model"
    )
    kt_weight_mode: str = flag(
        "auto",
        "host experts of a packed store: ram = copied into memory, mmap = read from its files as they are used, "
        "auto = ram if they fit",
        choices=("auto", "ram", "mmap"),
    )
    kt_method: str = flag(
        "auto",
        "weight format of the experts; auto: what the store holds, else the checkpoint",
        choices=tuple(KT_METHODS),
    )
    kt_cpuinfer: int = flag(0, "threads for the host experts; 0 = all physical cores", at_least=0)
    kt_threadpool_count: int | None = flag(
        None, "NUMA nodes that the host experts and their threads are divided over; default: all", at_least=1
    )
    kt_numa_nodes: tuple[int, ...] | None = flag(None, "which NUMA nodes; default: the first --kt-threadpool-count")
    kt_num_gpu_experts: int = flag(0, "experts for each MoE layer held on the device", at_least=0)
    kt_gpu_experts_ratio: float | None = flag(
        None, "share of all routed experts held on the device, 0..1; overrides --kt-num-gpu-experts", at_least=0
    )
    kt_expert_placement_strategy: str = flag("uniform", "which experts start on the device", choices=PLACEMENTS)
    init_expert_location: str | None = flag(
        None, "routing counts for --kt-expert-placement-strategy frequency (.safetensors or .pt with logical_count)"
    )
    kt_gpu_prefill_token_threshold: str = flag(
        "0", "tokens of a step from which it streams experts to the device: a number, auto = measured, 0 = never"
    )
    kt_profile: str | None = flag(
        None, "what hetero-glm5 bench machine wrote about this machine; default: measured at start, where it is needed"
    )
    kt_enable_dynamic_expert_update: bool = flag(False, "move experts between tiers by routing statistics")
    kt_max_deferred_experts_per_token: int = flag(
        0, "of a token's host experts, so many are added one layer later; changes results; 0 = none", at_least=0
    )
    record_kt_gpu_expert_distribution: bool = flag(
        False, "expert-distribution dumps also say which experts the device held, and how often it was asked for them"
    )
    expert_distribution_recorder_dir: str = flag(".", "folder for what POST /dump_expert_distribution_record writes")
    expert_distribution_recorder_mode: str = flag(
        "stat", "what is recorded: stat = counts; for each token's experts: hetero-glm5 trace record", choices=("stat",)
    )
    expert_distribution_recorder_buffer_size: int = flag(
        1000, "steps, the newest, of which a dump says which experts the device held; -1 = all", at_least=-1
    )

    max_total_tokens: int | None = flag(None, "tokens in the KV pool; default: what memory allows", at_least=1)
    context_length: int | None = flag(
        None, "longest sequence in tokens, at most the model's own; default: what the KV pool holds", at_least=2
    )
    mem_fraction_static: float = flag(0.85, "share of device memory for weights, device experts and the KV pool")
    kv_cache_dtype: str = flag(
        "auto",
        "type of the cached latents and keys; fp8_e4m3 takes about half the memory of bf16 and changes results",
        choices=tuple(KV_DTYPES),
    )
    disable_radix_cache: bool = flag(False, "compute every prompt whole; without it, known prefixes are reused")
    kv_host_size: float = flag(0.0, "GiB of host memory for pages of the KV pool that may be used again", at_least=0)
    kv_disk_path: str | None = flag(None, "folder for such pages, where they outlive the process")
    kv_disk_size: float | None = flag(None, f"GiB that they may take there; default: {KV_DISK_GIB}", at_least=0)
    page_size: int = flag(64, "tokens in a page of the KV pool", at_least=1)
    chunked_prefill_size: int = flag(2048, "tokens computed in one step at most", at_least=1)
    enable_mixed_chunk: bool = flag(True, "decode rows ride along with prefill chunks")
    max_running_requests: int = flag(16, "requests computed together", at_least=1)
    max_queued_requests: int = flag(256, "requests waiting; one more is refused", at_least=1)

    attention_backend: str = flag("auto", "attention implementation", choices=ATTENTION_BACKENDS)
    fp8_gemm_backend: str = flag("auto", "accepted; there is one implementation")
    tensor_parallel_size: int = flag(1, "1: one device", names="--tensor-parallel-size --tp-size --tp", at_least=1)
    enable_p2p_check: bool = flag(False, "accepted; there is no peer device")
    disable_shared_experts_fusion: bool = flag(False, "accepted; the shared expert is never fused with routed ones")

    speculative_algorithm: str = flag(
        "none", "draft tokens ahead with the MTP layer (both names mean that)", choices=("none", "EAGLE", "MTP")
    )
    speculative_num_steps: int | None = flag(
        None, f"most tokens drafted ahead; how many is chosen by what pays; default: {DRAFT_DEPTH}", at_least=0
    )
    speculative_eagle_topk: int | None = flag(None, "draft tokens tried at each step; 1 only", at_least=1)
    speculative_num_draft_tokens: int | None = flag(None, "tokens verified at once", at_least=1)
    speculative_config_method: str | None = flag(
        None, "vLLM's spelling of --speculative-algorithm", names="--speculative-config.method", choices=("mtp",)
    )
    speculative_config_num_speculative_tokens: int | None = flag(
        None, "vLLM's spelling of the draft depth", names="--speculative-config.num_speculative_tokens", at_least=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mem_fraction_static < 1:
            raise ConfigError(f"--mem-fraction-static is {self.mem_fraction_static}; it must lie between 0 and 1.")
        if self.kt_gpu_experts_ratio is not None and not self.kt_gpu_experts_ratio <= 1:
            raise ConfigError(f"--kt-gpu-experts-ratio is {self.kt_gpu_experts_ratio}; it must lie between 0 and 1.")
        threshold = self.kt_gpu_prefill_token_threshold
        if threshold != "auto" and not (threshold.isascii() and threshold.isdigit()):
            raise ConfigError(f"--kt-gpu-prefill-token-threshold is {threshold!r}; it must be a number, auto or 0.")
        if self.kt_expert_placement_strategy == "frequency" and self.init_expert_location is None:
            raise ConfigError(
                "--kt-expert-placement-strategy frequency needs routing counts: give --init-expert-location FILE."
            )
        if self.init_expert_location is not None and self.kt_expert_placement_strategy != "frequency":
            raise ConfigError(
                "--init-expert-location has no effect with --kt-expert-placement-strategy "
                f"{self.kt_expert_placement_strategy}: use frequency or leave it out."
            )
        if self.expert_distribution_recorder_buffer_size == 0:
            raise ConfigError("--expert-distribution-recorder-buffer-size is 0; it must be at least 1, or -1 for all.")
        self._check_drafting()
        self._check_store()
        self._refuse_unbuilt()

    def _refuse_unbuilt(self) -> None:
        """Flags whose feature this version does not have: refused, never ignored."""
        if self.tensor_parallel_size != 1:
            raise ConfigError(
                f"--tensor-parallel-size is {self.tensor_parallel_size}; hetero_glm5 drives one device. Use 1."
            )

    def _check_drafting(self) -> None:
        """The two spellings of the drafting flags say the same, and something that can be."""
        vllm = self.speculative_config_method is not None
        steps, tokens = self.speculative_num_steps, self.speculative_num_draft_tokens
        if vllm and self.speculative_algorithm != "none":
            raise ConfigError(
                "--speculative-config.method and --speculative-algorithm are two spellings of one choice. Leave one of "
                "the two out."
            )
        named = ("speculative_num_steps", "speculative_eagle_topk", "speculative_num_draft_tokens")
        if self.speculative_algorithm == "none":
            for name in named:
                if getattr(self, name) is not None:
                    other = "--speculative-config.num_speculative_tokens" if vllm else "--speculative-algorithm MTP"
                    raise ConfigError(f"--{name.replace('_', '-')} needs --speculative-algorithm; use {other}.")
        if self.speculative_config_num_speculative_tokens is not None and not vllm:
            raise ConfigError("--speculative-config.num_speculative_tokens needs --speculative-config.method mtp.")
        if self.speculative_eagle_topk not in (None, 1):
            raise ConfigError(
                f"--speculative-eagle-topk is {self.speculative_eagle_topk}; one draft is tried at each step. Use 1."
            )
        if steps is not None and tokens is not None and tokens != steps + 1:
            raise ConfigError(
                f"--speculative-num-draft-tokens is {tokens}, but {steps} draft steps and the drawn token are "
                f"{steps + 1}. Leave it out."
            )

    def _check_store(self) -> None:
        if self.kv_disk_size is not None and self.kv_disk_path is None:
            raise ConfigError("--kv-disk-size needs --kv-disk-path FOLDER, where the pages are kept.")
        if (self.kv_host_size or self.kv_disk_path is not None) and self.disable_radix_cache:
            raise ConfigError(
                "--kv-host-size and --kv-disk-path keep prefixes for reuse, which --disable-radix-cache turns off. "
                "Leave one of the two out."
            )

    @property
    def draft_depth(self) -> int:
        """The most tokens drafted ahead of a sequence; 0 = none."""
        if self.speculative_config_method is not None:
            depth = self.speculative_config_num_speculative_tokens
        elif self.speculative_algorithm == "none":
            return 0
        else:
            tokens = self.speculative_num_draft_tokens
            depth = tokens - 1 if self.speculative_num_steps is None and tokens else self.speculative_num_steps
        return DRAFT_DEPTH if depth is None else depth

    def resolve(
        self,
        model: ModelConfig,
        *,
        cuda: bool,
        node_cores: Mapping[int, int],
        packed_as: str | None = None,
        quantised_as: str = "",
    ) -> tuple[EngineConfig, list[str]]:
        """Settles every "auto" for this model and machine, but for --kt-weight-mode, which the memory settles.

        node_cores: physical cores by NUMA node. packed_as: the method of the packed store at --kt-weight-path, if it
        is one. quantised_as: FP8 or INT4 if the experts are a checkpoint's, all of them in that.

        Returns the settled config and one sentence for each flag that means something else, or nothing, here.
        """
        notes: list[str] = []
        if self.device == "cuda" and not cuda:
            raise ConfigError("--device cuda: torch sees no CUDA device here. Use --device cpu, or check the driver.")
        device = "cuda" if self.device != "cpu" and cuda else "cpu"
        method = self._settle_method(packed_as, quantised_as, notes)
        nodes = self._settle_nodes(list(node_cores), notes)
        threads = self._settle_threads(nodes, sum(node_cores[node] for node in nodes or node_cores), notes)
        self._check_gpu_flags(device, notes)
        if self.kt_num_gpu_experts > model.n_routed_experts:
            raise ConfigError(
                f"--kt-num-gpu-experts is {self.kt_num_gpu_experts}; a layer of this model has "
                f"{model.n_routed_experts} experts."
            )
        if self.context_length is not None and self.context_length > model.max_position_embeddings:
            raise ConfigError(
                f"--context-length is {self.context_length}; this model was made for "
                f"{model.max_position_embeddings} positions."
            )
        if self.draft_depth and not model.num_nextn_predict_layers:
            raise ConfigError(
                "--speculative-algorithm: this model has no MTP layer (num_nextn_predict_layers is 0). Leave it out."
            )
        kv = KV_DTYPES[self.kv_cache_dtype]
        settled = dataclasses.replace(
            self,
            device=device,
            kt_method=method,
            kt_cpuinfer=threads,
            kt_threadpool_count=len(nodes) or 1,
            kt_numa_nodes=nodes,
            kv_cache_dtype=self.dtype if kv == "auto" else kv,
        )
        return settled, notes

    @property
    def divides_prefills(self) -> bool:
        return bool(self.kt_gpu_prefill_token_threshold.strip("0"))

    @property
    def moves_experts(self) -> bool:
        """Whether experts are copied from the host while the model runs, so that the host holds all of them."""
        return bool(self._movers)

    @property
    def _movers(self) -> list[str]:
        prefill = f"--kt-gpu-prefill-token-threshold {self.kt_gpu_prefill_token_threshold}"
        update = "--kt-enable-dynamic-expert-update"
        return [prefill] * self.divides_prefills + [update] * self.kt_enable_dynamic_expert_update

    def _settle_method(self, packed_as: str | None, quantised_as: str, notes: list[str]) -> str:
        method = KT_METHODS[self.kt_method]
        if method not in ("auto", self.kt_method):
            notes.append(f"--kt-method {self.kt_method} means {method} here.")
        if packed_as is not None:
            if method not in ("auto", packed_as):
                raise ConfigError(
                    f"--kt-method {self.kt_method}: the experts in {self.kt_weight_path} are packed as {packed_as}. "
                    f"Use auto, or pack the checkpoint again: hetero-glm5 quantize --kt-method {method}."
                )
            return packed_as
        if self.kt_weight_mode == "mmap":
            raise ConfigError(
                "--kt-weight-mode mmap: a checkpoint's experts have to be packed; only a packed store can be mapped. "
                "Make one with hetero-glm5 quantize and name it with --kt-weight-path."
            )
        if method == "auto":
            method = "FP32" if self.dtype == "float32" else quantised_as or "BF16"
        if method == "FP8" and quantised_as != "FP8":
            raise ConfigError(
                f"--kt-method FP8 takes experts that are FP8 as they are; those in {self.kt_weight_path or self.model} "
                "are not. Use auto or BF16, or the FP8 checkpoint."
            )
        return method

    def _settle_nodes(self, here: list[int], notes: list[str]) -> tuple[int, ...]:
        """The NUMA nodes to divide the host experts over; none on a machine with one, if that is not asked for."""
        count, nodes = self.kt_threadpool_count, self.kt_numa_nodes
        machine = f"this process may use NUMA node{'s' if len(here) > 1 else ''} {_listed(here)}"
        if nodes:
            unknown = [node for node in nodes if node not in here]
            if unknown:
                raise ConfigError(f"--kt-numa-nodes names node {unknown[0]}; {machine}.")
            if len(set(nodes)) < len(nodes):
                raise ConfigError(f"--kt-numa-nodes {_listed(nodes)} names a node twice; name each once.")
            if count not in (None, len(nodes)):
                raise ConfigError(
                    f"--kt-threadpool-count is {count}, but --kt-numa-nodes names {len(nodes)}; there is one pool for "
                    "each node. Leave one of the two out."
                )
            return nodes
        if len(here) == 1:
            if count is not None and count > 1:
                notes.append(f"--kt-threadpool-count {count}: {machine}, on which one pool serves the host experts.")
            return ()
        if count is not None and count > len(here):
            raise ConfigError(
                f"--kt-threadpool-count is {count}; {machine}, and there is one pool for each. Use {len(here)}, or "
                "leave it out."
            )
        return tuple(here[:count])

    def _settle_threads(self, nodes: tuple[int, ...], cores: int, notes: list[str]) -> int:
        where = f" of NUMA nodes {_listed(nodes)}" if nodes else ""
        if self.kt_cpuinfer > cores:
            notes.append(
                f"--kt-cpuinfer {self.kt_cpuinfer}: this process may use {cores} physical cores{where}; using them."
            )
        threads = min(self.kt_cpuinfer or cores, cores)
        if threads < len(nodes):
            raise ConfigError(
                f"--kt-cpuinfer is {threads}; the host experts need a thread on each{where}. Use at least "
                f"{len(nodes)}, or a smaller --kt-threadpool-count."
            )
        return threads

    def _check_gpu_flags(self, device: str, notes: list[str]) -> None:
        if self._movers and self.kt_weight_mode == "mmap":
            raise ConfigError(
                f"{self._movers[0]} copies experts from host memory, and --kt-weight-mode mmap leaves them in files. "
                "Use --kt-weight-mode ram, or leave one of the two out."
            )
        if self._movers and self.kt_max_deferred_experts_per_token:
            raise ConfigError(
                f"--kt-max-deferred-experts-per-token {self.kt_max_deferred_experts_per_token} defers experts by where "
                f"they are, which {self._movers[0]} changes: the same request would get other answers. Leave one of "
                "the two out."
            )
        if device == "cpu":
            notes += [f"{flag} copies nothing here: both tiers are the same memory." for flag in self._movers]
        if self.kt_profile is not None and (device == "cpu" or not self._movers):
            notes.append("--kt-profile has no effect: no experts are moved, so nothing has to be weighed.")
        if self.attention_backend not in ("auto", "torch"):
            notes.append(f"--attention-backend {self.attention_backend}: attention runs in torch in this version.")
        if self.fp8_gemm_backend != "auto":
            notes.append(f"--fp8-gemm-backend {self.fp8_gemm_backend}: dense layers are dequantised when read.")
        if self.trust_remote_code:
            notes.append("--trust-remote-code: nothing from a checkpoint is ever executed.")
        if self.enable_p2p_check:
            notes.append("--enable-p2p-check has no effect with one device.")
        if self.disable_shared_experts_fusion:
            notes.append("--disable-shared-experts-fusion: the shared expert is never fused with routed ones.")


def _listed(nodes: Iterable[int]) -> str:
    return ", ".join(map(str, nodes))


@dataclass(frozen=True)
class ServerConfig(Flags):
    """Where and how the HTTP server listens."""

    host: str = flag("127.0.0.1", "address to listen on")
    port: int = flag(30000, "port to listen on; 0 = any free one", at_least=0)
    served_model_name: str | None = flag(None, "the model's name in the API; default: the folder's name")
    api_key: str | None = flag(None, "require this key (Authorization: Bearer, or x-api-key)")
    allowed_hosts: tuple[str, ...] | None = flag(
        None, "names that clients may call the server by (Host header); default: localhost's if --host is, else any"
    )
    allowed_origins: tuple[str, ...] | None = flag(
        None, "origins of web pages that may use the server; * = any; default: those on localhost"
    )
    reasoning_parser: str | None = flag(None, "separate reasoning from content", choices=("glm45",))
    tool_call_parser: str | None = flag(None, "turn tool-call text into tool_calls", choices=("glm47",))
    enable_auto_tool_choice: bool = flag(False, "what --tool-call-parser does anyway; needs it")
    request_timeout: float | None = flag(
        None, "seconds after which a request that is not finished ends with an error; default: never", at_least=0.001
    )
    watchdog_timeout: float = flag(300.0, "seconds without progress after which the server gives up", at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.port > 65535:
            raise ConfigError(f"--port is {self.port}; it must be at most 65535.")
        if self.enable_auto_tool_choice and self.tool_call_parser is None:
            raise ConfigError("--enable-auto-tool-choice needs --tool-call-parser glm47.")
