"""The pocket model: a tiny language model that plays Countdown, shipped with the package.

`make.py` made it; `card.json` records how it was made and which fraction of held-out problems it solves.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
WEIGHTS = FOLDER / "model"
NUM_PROMPTS = 2048
"""Number of training prompts in the default run."""


def load():
    """Load the pocket model (in float32) and its tokenizer; no network needed.

    Returns: (Qwen2ForCausalLM, PreTrainedTokenizerFast).
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from grpo_lab.models.loading import without_progress_bars

    with without_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=torch.float32, local_files_only=True)
    return model, AutoTokenizer.from_pretrained(WEIGHTS, local_files_only=True)
