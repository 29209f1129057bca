"""SHELF: the servers that carry the service."""
