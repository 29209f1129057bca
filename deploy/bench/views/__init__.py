"""The report as a page: its sections, each a chart with its table."""
