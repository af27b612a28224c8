"""Tasks: Countdown, GSM8K, reasoning-gym, prompts from files, and small models pre-trained for Countdown.

A task consists of prompts with answers, reward functions and a model to start from.
"""
