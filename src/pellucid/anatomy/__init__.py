"""What a model is made of: sites, discovery, instrumented attention, proofs, loading."""
