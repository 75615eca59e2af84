"""`bpt-dist run-table` and `bpt-dist table`."""
