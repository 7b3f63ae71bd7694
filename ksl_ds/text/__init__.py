"""Corpora, prompts, batches, translation, scores."""
