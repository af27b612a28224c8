"""Operations on Hugging Face models: forward passes, LoRA adapters, precision, loading.

Nothing here samples, computes rewards or trains.
"""
