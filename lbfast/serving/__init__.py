"""`lbfast serve`: embeddings over HTTP. What it needs besides comes with the extra `serve`."""
