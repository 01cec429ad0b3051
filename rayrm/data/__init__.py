"""Read and parse preference records, and generate the quickstart's sample."""
