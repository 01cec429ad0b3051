"""Fit a reward model on Ray Train with DeepSpeed ZeRO: losses, data, loop, checkpoints."""
