"""What is learned: Countdown, GSM8K, reasoning-gym, data from files, and the models made for them.

A task brings prompts with answers, a reward and a model to start from.
"""
