"""Text in, numbers out: verifiable rewards, reward models, and the process in which foreign graders run.

Nothing here trains or samples.
"""
