"""Merge, export and serve parameter-efficient tuners over one shared frozen backbone."""
