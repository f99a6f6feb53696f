"""Ctrl-C and SIGTERM, which a training obeys at a place of its choice."""

from __future__ import annotations

import signal
import threading
from types import TracebackType
from typing import Any


class Stop:
    """Ctrl-C and SIGTERM ask to stop; a second one does not wait.

    Attributes:
        asked: Whether one came.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True
        signal.signal(number, self._before[signal.Signals(number)])
