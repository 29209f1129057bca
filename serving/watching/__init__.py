"""What a server did, as counters, as Prometheus reads them, and as lines."""
