"""`bpt-dist sweep`."""
