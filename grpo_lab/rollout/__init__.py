"""Prompts in, completions and their log-probabilities out: encoding, sampling, scoring, vLLM.

Nothing here knows rewards, advantages or the settings of a run.
"""
