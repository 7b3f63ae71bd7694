"""Loading a model, which parameters a method trains, tied and untied embeddings, model folders."""
