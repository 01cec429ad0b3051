"""Evaluate rewards against preferences: figures, pictures and the report."""
