"""The pocket model: a tiny language model that plays Countdown, shipped with the package.

`make.py` beside this file made it; `card.json` says when, how long it took and what it can do.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
WEIGHTS = FOLDER / "model"
NUM_PROMPTS = 2048
"""Prompts in the training set of the default run."""


def load():
    """The pocket model (float32) and its tokenizer, as transformers loads them. No network is needed.

    Returns: (Qwen2ForCausalLM, PreTrainedTokenizerFast).
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from grpo_lab.models.loading import without_progress_bars

    with without_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=torch.float32, local_files_only=True)
    return model, AutoTokenizer.from_pretrained(WEIGHTS, local_files_only=True)
