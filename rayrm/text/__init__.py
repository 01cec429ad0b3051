"""Turn rows of text into token ids: chat templates, ends of turn, truncation, fingerprints."""
