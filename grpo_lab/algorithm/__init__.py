"""The equations of GRPO, in the order of the notebooks: log-probabilities, advantages, clipped loss, KL.

Pure functions of tensors that import nothing but PyTorch: no models, no files, no random numbers, no settings of a run.
Read this folder first.
"""
