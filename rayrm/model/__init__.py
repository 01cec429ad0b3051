"""Build, export and run reward models in one process: attention, decoder, head and scoring."""
