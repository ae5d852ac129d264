"""What is nearest in a Parquet file of embeddings: exactly, in memory that does not grow with the file."""
