"""FLOOR 4: the front door, from a command line to a verdict."""
