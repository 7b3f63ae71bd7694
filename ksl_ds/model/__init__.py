"""Model folders, loading under ZeRO, trainable rows, adapters, tied and untied embeddings."""
