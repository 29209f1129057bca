"""Two reports side by side: what holds whatever the reports are of."""
