"""The equations of GRPO, in the order of the notebooks: log-probabilities, advantages, clipped loss, KL.

Pure functions of tensors that need PyTorch alone. No model, no file, no random number and no setting of a run may
be used here. Read this room first.
"""
