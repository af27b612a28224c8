"""The command line, `grpo-lab`: one module per command, each with its flags (`add_parser`) and what it does (`run`).

No other room imports this one.
"""
