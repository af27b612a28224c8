"""A run: settings, the step (sample, score, compare, update), evaluation, checkpoints, metrics.

Tasks, memory plans, lessons and the command line may use this room; it uses none of them.
"""
