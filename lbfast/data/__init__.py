"""What is read: manifests, shards and their samples, which files hold which modality, and decoding ahead of a model."""
