"""HTTP(S) servers with index pages."""
