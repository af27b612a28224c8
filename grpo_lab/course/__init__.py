"""What the notebooks use besides the algorithm: judges of exercises, widgets, recorded runs, and lessons.

Nothing outside this room and the command line may import it.
"""
