"""Serve a reward model on Ray Serve: client, queue, replica, versions, operations."""
