"""Estimate the memory and the time of a run without running it on the device.

`plan` is the entry point; it makes a dry run of one step on fake tensors, which have shapes and no values.
"""
