"""The order in which prompts are used: shuffled anew each epoch, and saved with a checkpoint."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass
class PromptOrder:
    """Which prompts come next: every epoch a new shuffle, drawn from the seed and the epoch's number alone.

    Its whole state is (epoch, cursor), so a resumed run goes on exactly where it stopped. The last
    batch of an epoch may be smaller than the others; no prompt is dropped and none comes twice.

    Args:
        size: number of prompts in the dataset.
        batch_size: prompts per batch.
        seed: of the shuffles.
    """

    size: int
    batch_size: int
    seed: int
    epoch: int = 0
    cursor: int = 0

    @property
    def batches_per_epoch(self) -> int:
        """How many batches an epoch has, the last, smaller one included."""
        return -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        """Indices of the next batch; goes on for ever."""
        if self.cursor >= self.size:
            self.epoch, self.cursor = self.epoch + 1, 0
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "epoch", self.epoch))
        order = torch.randperm(self.size, generator=generator)
        batch = order[self.cursor : self.cursor + self.batch_size].tolist()
        self.cursor += len(batch)
        return batch

    def state_dict(self) -> dict[str, int]:
        """Where it stands."""
        return {"epoch": self.epoch, "cursor": self.cursor}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self.epoch, self.cursor = state["epoch"], state["cursor"]


def derived_seed(seed: int, purpose: str, number: int) -> int:
    """A seed of its own for each purpose and step, so that no draw depends on what was drawn before it."""
    return zlib.crc32(f"{seed}/{purpose}/{number}".encode())
