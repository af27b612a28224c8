"""Presets: the settings of papers, by name, and those of the built-in tasks."""

from typing import Any

# Each variant is a handful of arguments. They say what a paper changes, not which model or batch it used.
PRESETS: dict[str, dict[str, Any]] = {
    # DeepSeekMath (arXiv 2402.03300)
    "grpo": {},
    # Dr. GRPO (2503.20783): no std (difficulty bias), no division by length (length bias), no KL
    "dr_grpo": {"scale_rewards": "none", "aggregation": "constant", "kl_coef": 0.0},
    # DAPO (2503.14476): every token counts the same, clip higher, no KL; without its dynamic sampling
    "dapo": {"aggregation": "token-mean", "clip_range_high": 0.28, "kl_coef": 0.0},
    # as TRL's loss "bnpo": GRPO with every token counting the same
    "bnpo": {"aggregation": "token-mean"},
    # GSPO (2507.18071): one ratio per completion, hence a range a thousand times narrower
    "gspo": {"importance": "sequence", "clip_range": 3e-4, "clip_range_high": 4e-4, "kl_coef": 0.0},
    # CISPO (MiniMax-M1, 2506.13585): a capped weight instead of a cut gradient; the cap is 1 + clip_range_high = 5
    "cispo": {"surrogate": "cispo", "clip_range_high": 4.0, "aggregation": "token-mean", "kl_coef": 0.0},
    # RLOO (2402.14740): leave-one-out baseline, KL in the reward, whole-completion log-probabilities. With
    # num_iterations > 1 the ratio is the geometric mean over tokens, where the paper has the product.
    "rloo": {
        "baseline": "leave-one-out", "scale_rewards": "none", "kl_in": "reward", "kl_estimator": "k1",
        "importance": "sequence", "aggregation": "constant", "aggregation_constant": 1.0,
    },
    # Williams (1992): reward times the gradient of the completion's log-probability
    "reinforce": {
        "baseline": "none", "scale_rewards": "none", "kl_coef": 0.0,
        "aggregation": "constant", "aggregation_constant": 1.0,
    },
    # The default run on the embedded pocket model, found by benchmarks/learning.py
    "pocket": {
        "num_generations_per_prompt": 8, "max_new_tokens": 16, "temperature": 1.0, "top_k": 0, "top_p": 1.0,
        "learning_rate": 6e-4, "batch_size": 16, "gradient_accumulation_steps": 1, "max_steps": 100, "warmup_steps": 5,
        "kl_coef": 0.02, "logging_steps": 1, "save_steps": 50,
    },
    # Qwen2.5-0.5B-Instruct on GSM8K with one GPU of 24 GB or more; not measured yet. Learning rate, weight of the KL
    # and length are those of verl's GRPO example for GSM8K (examples/grpo_trainer, Qwen2-7B, 1024 prompts a step); the
    # rate is DeepSeekMath's too. K is 8 and a step has 32 prompts, so that 200 steps, most of the training set once,
    # are affordable. A right number weighs 1, the form that it is asked in 0.2: form alone never beats being right.
    # One prompt at a time is what 24 GB hold (planned: 19 GiB); with more, --batch-size 4 and 8 steps of accumulation.
    "gsm8k": {
        "num_generations_per_prompt": 8, "max_new_tokens": 512, "temperature": 1.0, "top_k": 0, "top_p": 1.0,
        "learning_rate": 1e-6, "lr_scheduler": "constant_with_warmup", "warmup_steps": 10, "max_steps": 200,
        "batch_size": 1, "gradient_accumulation_steps": 32, "kl_coef": 0.001, "reward_weights": (1.0, 0.2),
        "logging_steps": 1, "eval_steps": 50, "save_steps": 50, "save_total_limit": 2,
    },
    # Countdown with four numbers, on a model that `grpo-lab pretrain` made: large groups, no reference model
    "countdown4": {
        "num_generations_per_prompt": 32, "max_new_tokens": 10, "temperature": 1.0, "top_k": 0, "top_p": 1.0,
        "learning_rate": 6e-4, "batch_size": 32, "gradient_accumulation_steps": 1, "max_steps": 150, "warmup_steps": 5,
        "kl_coef": 0.0, "save_steps": 150,
    },
}  # fmt: skip
