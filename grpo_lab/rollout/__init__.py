"""From prompts to completions and their log-probabilities: encoding, sampling, scoring, vLLM.

Nothing here depends on rewards, advantages or the settings of a run.
"""
