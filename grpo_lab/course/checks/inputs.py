"""The smallest inputs that a judge asks about, shared by several judges."""

import torch
from torch import Tensor


def log_of(*probabilities: list) -> Tensor:
    """Return the logarithms of rows of probabilities."""
    return torch.tensor(probabilities).log()


YES, BOTH, FIRST, SHORT_LONG = [[True]], [[True] * 2] * 2, [[True, False]], [[True, False], [True] * 2]
HALF, QUARTER, PADDED = log_of([0.5]), log_of([0.25]), log_of([0.5, 0.0])
