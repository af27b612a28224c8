"""The machine under a run: device and precision, processes, CPU cores and memory, signals.

Nothing here knows GRPO, a language model or the settings of a run.
"""
