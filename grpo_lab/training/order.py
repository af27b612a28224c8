"""The order in which prompts are used: shuffled anew each epoch, and saved with a checkpoint."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass
class PromptOrder:
    """Iterate over batches of prompt indices; each epoch is shuffled from the seed and its own number alone.

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
        """Return the number of batches per epoch, including a smaller last one."""
        return -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        """Return the indices of the next batch; never ends."""
        if self.cursor >= self.size:
            self.epoch, self.cursor = self.epoch + 1, 0
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "epoch", self.epoch))
        order = torch.randperm(self.size, generator=generator)
        batch = order[self.cursor : self.cursor + self.batch_size].tolist()
        self.cursor += len(batch)
        return batch

    def state_dict(self) -> dict[str, int]:
        """Return the position, for a checkpoint."""
        return {"epoch": self.epoch, "cursor": self.cursor}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a saved position."""
        self.epoch, self.cursor = state["epoch"], state["cursor"]


def derived_seed(seed: int, purpose: str, number: int) -> int:
    """Return a separate seed for each purpose and step, so that no draw depends on earlier draws."""
    return zlib.crc32(f"{seed}/{purpose}/{number}".encode())
