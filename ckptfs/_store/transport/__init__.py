"""Connections to servers: addresses, proxies, TLS, patience and errors."""
