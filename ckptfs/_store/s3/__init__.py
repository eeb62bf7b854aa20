"""S3: the store, its HTTP client, signatures and listings."""
