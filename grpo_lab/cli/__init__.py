"""The command line, `grpo-lab`: one module per command.

Nothing imports this room.
"""
