"""`bpt-dist plan`."""
