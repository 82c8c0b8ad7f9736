"""Puts packed experts into slots of the device tier: behind the steps, or for the layer that is being computed."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence

from torch import Tensor

from hetero_glm5.experts.copies import Copies, Failed, Mark
from hetero_glm5.placement.planner import Move
from hetero_glm5.weights.quantize import PackedExperts

log = logging.getLogger(__name__)


class Mover:
    """`experts[i]` holds every expert of MoE layer i on the host; `slots` uint8 [S, blob_bytes] are on the device.
    `background` and `urgent` are two lines of copies of that device."""

    def __init__(self, experts: Sequence[PackedExperts], slots: Tensor, background: Copies, urgent: Copies):
        self.experts, self.slots, self.background, self.urgent = experts, slots, background, urgent
        self._flying: deque[tuple[Move, Mark]] = deque()
        self.moved_bytes = self.fetched_bytes = 0  # by start() and by fetch()

    def start(self, moves: Sequence[Move]) -> None:
        """Copies behind the next step. What their slots held is not to be used any more. Does not raise: settle() tells
        of what failed."""
        if not moves:
            return
        try:
            self.background.after_compute()
            for move in moves:
                piece = self.experts[move.layer], move.expert, self.slots[move.slot]
                self.moved_bytes += copy_expert(*piece, self.background)
                self._flying.append((move, self.background.mark()))
        except RuntimeError as error:
            started = {move for move, _ in self._flying}
            self._flying += ((move, Failed(error)) for move in moves if move not in started)

    def settle(self) -> tuple[int, list[Move]]:
        """Of the moves that start() was given: how many, the newest, have not ended, and which of the others failed."""
        failed = []
        while self._flying:
            move, mark = self._flying[0]
            try:
                if not mark.passed():
                    break
            except RuntimeError as error:  # the expert stays where it was, on the host, so no request is touched
                log.error("expert %d of MoE layer %d was not moved to the device: %s", move.expert, move.layer, error)
                failed.append(move)
            self._flying.popleft()
        return len(self._flying), failed

    def fetch(self, moves: Sequence[Move]) -> None:
        """Copies now; what the device is asked to compute from here on finds the experts in their slots."""
        if not moves:
            return
        self.urgent.after_compute()
        try:
            for move in moves:
                piece = self.experts[move.layer], move.expert, self.slots[move.slot]
                self.fetched_bytes += copy_expert(*piece, self.urgent)
        finally:  # also what was copied before a failure is in order with what follows
            self.urgent.mark().hold()

    def close(self) -> None:
        """Waits for all copies."""
        self.background.close()
        self.urgent.close()


def copy_expert(experts: PackedExperts, expert: int, slot: Tensor, copies: Copies) -> int:
    """Asks for the copy of one expert's blob into `slot`, uint8 [blob_bytes]. Returns its bytes."""
    for offset, piece in experts.pieces(expert):
        copies.copy(slot[offset : offset + piece.nbytes], piece)
    return slot.nbytes
