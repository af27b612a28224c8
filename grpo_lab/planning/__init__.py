"""Will a run fit, and how long will it take? Memory and time, planned without running on the device.

`plan` is the entry; it rehearses a step with tensors that have shapes and no values.
"""
