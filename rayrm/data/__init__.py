"""Preference records: where they lie, what they hold, and the sample of the quickstart."""
