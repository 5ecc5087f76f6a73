"""Token ids to logits: the transformer, and what lies beneath it."""
