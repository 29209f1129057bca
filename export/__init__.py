"""FLOOR 2: a torch model becomes an engine in a bundle."""
