"""Google Cloud Storage and Azure Blob Storage: stores, signed requests and tokens."""
