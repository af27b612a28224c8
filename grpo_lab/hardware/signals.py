"""Ctrl-C and SIGTERM: finish the current step, or a change of state, before stopping."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def delayed_interrupts() -> Iterator[None]:
    """Delay Ctrl-C (SIGINT) until the block has ended, for changes that must happen together or not at all."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or handler in (None, signal.SIG_IGN):
        yield
        return
    received = []
    signal.signal(signal.SIGINT, lambda number, _frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if received:
            signal.raise_signal(signal.SIGINT)


@contextmanager
def interrupt_between_steps() -> Iterator[list[int]]:
    """Handle SIGINT (Ctrl-C), SIGTERM and SIGHUP: the first one is only recorded, the second one acts at once.

    The caller checks the list between steps. Clusters send SIGTERM before they reclaim a machine.

    Yields: the list of signal numbers received so far.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # Python runs handlers there only
        yield received
        return

    def restore_handlers() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def record_signal(number: int, _frame) -> None:
        received.append(number)
        restore_handlers()  # before the message, since the second signal may come as soon as it is printed
        print("\nFinishing this step; Ctrl-C again stops at once.", flush=True)

    numbers = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}  # SIGHUP: a closed terminal
    handlers = {number: signal.getsignal(number) for number in numbers}
    # None: installed by C code, and Python cannot restore it. SIG_IGN: a shell's background job ignores SIGINT.
    handlers = {number: handler for number, handler in handlers.items() if handler not in (None, signal.SIG_IGN)}
    try:
        for number in handlers:
            signal.signal(number, record_signal)
        yield received
    finally:
        restore_handlers()
