"""Turning gradients off for a thread over blocks that need not end in order."""

from __future__ import annotations

import threading

import torch


class ThreadGradients(threading.local):
    """Gradients off for a thread while any block of it is open, in whatever order the blocks end.

    Coroutines of one thread may leave their blocks in another order than they entered them. So what was before
    is kept for the thread, not for the block: whichever block ends gives back what the last to enter had found.
    """

    def __init__(self) -> None:
        self.before: list[bool] = []

    def disable(self) -> None:
        """Turn gradients off, remembering what was."""
        self.before.append(torch.is_grad_enabled())
        torch.set_grad_enabled(False)

    def restore(self) -> None:
        """Give back what the last :meth:`disable` of this thread had found.

        Raises:
            RuntimeError: If this thread has turned nothing off.
        """
        if not self.before:
            raise RuntimeError(
                "this EvalGuard block was entered in another thread, where gradients now stay off; "
                "enter and leave it in one thread, or call the guard itself for each forward"
            )
        torch.set_grad_enabled(self.before.pop())


gradients = ThreadGradients()
