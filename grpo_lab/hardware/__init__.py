"""Hardware and processes: device and precision, process group, CPU cores and memory, signals.

These modules do not depend on GRPO, on a language model or on the settings of a run.
"""
