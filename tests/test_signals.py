"""Stop signals outside the main thread. What they do to a run is in test_nonfinite.py."""

from __future__ import annotations

import threading

from rlhf_accel.system.signals import StopRequest


def test_handlers_stay_as_they_are_outside_the_main_thread() -> None:
    def enter() -> None:
        with StopRequest() as request:
            seen.append(request.received)

    seen: list[str | None] = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [None]
