"""Copies of packed experts into slots of a device, beside what the device computes.

Two orders have to be kept: a slot is overwritten only when nothing that was asked of the device still reads it
(`after_compute`), and read only when its copy has ended (`Mark.hold`). `Copies` is what this needs of a device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from hetero_glm5.core import UserError


class Mark(Protocol):
    """A point in a line of copies."""

    def passed(self) -> bool:
        """Whether all copies before it have ended. Raises what one of them raised."""

    def hold(self) -> None:
        """What the device is asked to compute from here on waits for the point."""


class Copies(Protocol):
    """A line of copies: one after the other, in the order of the calls, none of which waits."""

    def pin(self, memory: Tensor) -> None:
        """Lets copies read host memory directly, for as long as it exists. UserError if that cannot be."""

    def after_compute(self) -> None:
        """Copies from here on wait for all that the device has been asked to compute until now."""

    def copy(self, target: Tensor, source: Tensor) -> None: ...

    def mark(self) -> Mark: ...

    def close(self) -> None:
        """Waits for its copies, and lets go of the memory that it pinned."""


class Ended:
    def passed(self) -> bool:
        return True

    def hold(self) -> None:
        pass


class Failed(Ended):
    """Of copies that could not even be asked for."""

    def __init__(self, error: RuntimeError) -> None:
        self._error = error

    def passed(self) -> bool:
        raise self._error


class AtOnce:
    """On the CPU: a copy has ended when the call returns."""

    def pin(self, memory: Tensor) -> None:
        pass

    def after_compute(self) -> None:
        pass

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def mark(self) -> Mark:
        return Ended()

    def close(self) -> None:
        pass


class CudaMark:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def passed(self) -> bool:
        return self._event.query()

    def hold(self) -> None:
        torch.cuda.current_stream().wait_event(self._event)


class CudaCopies:
    """A CUDA stream of its own; the device computes in the stream that is current when a method is called."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pinned: list[Tensor] = []

    def pin(self, memory: Tensor) -> None:
        error = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
        if error:
            raise UserError(
                f"CUDA refuses to pin {memory.nbytes / (1 << 30):.1f} GiB of host experts (cudaHostRegister: error "
                f"{error}), which moving experts needs. Start without --kt-enable-dynamic-expert-update and with "
                "--kt-gpu-prefill-token-threshold 0, or raise the limit of locked memory (ulimit -l)."
            )
        self._pinned.append(memory)

    def after_compute(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())

    def copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def mark(self) -> Mark:
        return CudaMark(self._stream.record_event())

    def close(self) -> None:
        self._stream.synchronize()
        while self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._pinned.pop().data_ptr())


def copies_for(device: torch.device) -> Callable[[], Copies]:
    """Makes lines of copies for a torch device."""
    return AtOnce if device.type == "cpu" else lambda: CudaCopies(device)
