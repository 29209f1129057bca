"""Who waits, who goes next, and what goes together into one engine call."""
