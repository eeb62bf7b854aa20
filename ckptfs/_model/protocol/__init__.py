"""The control protocol: requests, replies and their encoding."""
