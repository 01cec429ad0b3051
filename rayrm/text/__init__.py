"""A row's text and its token ids: chat templates, ends, cuts, fingerprints."""
