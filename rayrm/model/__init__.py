"""The reward model: attention, decoder, head, exports, and scoring in one process."""
