"""The latency benchmark and its report."""
