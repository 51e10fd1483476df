"""Texts in, embeddings out: an accelerated encoder, batches without padding, jobs that resume."""
