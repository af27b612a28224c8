"""Rewards: verifiable reward functions, reward models, and the subprocess in which graders of other libraries run.

Nothing here trains or samples.
"""
