"""hetero_glm5: serves GLM-5 on one workstation, attention and hot experts on the GPU, the other experts on the CPU."""

from __future__ import annotations

from typing import Any

from hetero_glm5.config import bound_openmp_spin

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams"]


bound_openmp_spin()


def __getattr__(name: str) -> Any:
    """LLM and SamplingParams, imported when first asked for: `import hetero_glm5.config` must not load torch."""
    if name == "LLM":
        from hetero_glm5.llm import LLM

        return LLM
    if name == "SamplingParams":
        from hetero_glm5.core import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
