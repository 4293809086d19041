"""From prompts to picture files. No network layer and no sampler formula is here."""
