"""Where bytes go: the claim on OUT, staging, journal, shards, manifest, card."""
