"""What is done to a Hugging Face model: forward passes, LoRA adapters, precision, loading.

Nothing here samples, scores rewards or trains.
"""
