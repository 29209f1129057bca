"""FLOOR 1: tuners and a frozen backbone become one torch model."""
