"""How a run ends before its time: by Ctrl-C, by the cluster, or for want of memory."""

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from grpo_lab.config import GRPOConfig

OUT_OF_MEMORY = (
    "out of memory on {device}, with micro-batches of {rows} completions of up to {length} tokens (sampling takes "
    "several at a time). Lower one of: "
    "--batch-size (now {batch_size}; more --gradient-accumulation-steps keeps the step as it is), "
    "--num-generations (K, now {k}), --max-new-tokens (now {length}); or use --precision bf16 (now {precision}), "
    "--gradient-checkpointing, or a smaller model. Checkpoints and metrics so far are in {output_dir}."
)


@contextmanager
def memory_explained(device: torch.device, precision: str, config: GRPOConfig) -> Iterator[None]:
    """Out of memory, on whatever device, becomes a MemoryError that says what to lower."""
    try:
        yield
    except RuntimeError as error:
        said = re.search("out of memory|can't allocate memory", str(error))  # CUDA's driver, Apple's MPS; a CPU
        if not (said or isinstance(error, torch.OutOfMemoryError)):
            raise
        words = OUT_OF_MEMORY.format(
            device=device, rows=config.batch_size * config.num_generations_per_prompt, length=config.max_new_tokens,
            batch_size=config.batch_size, k=config.num_generations_per_prompt, precision=precision,
            output_dir=config.output_dir,
        )  # fmt: skip
        raise MemoryError(words) from error


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
