"""FLOOR 3: a bundle answers requests. Needs neither torch nor timm."""
