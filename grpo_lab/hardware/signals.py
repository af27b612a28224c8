"""Ctrl-C and SIGTERM: finish the step first."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interrupt_between_steps() -> Iterator[list[int]]:
    """Let the first Ctrl-C wait until the step is finished: it only fills the list. The second acts at once.

    So does SIGTERM, as a cluster sends it before it takes a machine away.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to that one only
        yield received
        return

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _frame) -> None:
        received.append(number)
        put_back()  # before it is promised: the second may come at once
        print("\nFinishing this step; Ctrl-C again stops at once.", flush=True)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # None is not Python's to put back; what is ignored stays so, as for a run in the background of a shell script
    before = {number: handler for number, handler in before.items() if handler not in (None, signal.SIG_IGN)}
    try:
        for number in before:
            signal.signal(number, note)
        yield received
    finally:
        put_back()
