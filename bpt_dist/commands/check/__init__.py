"""`bpt-dist check`."""
