"""`bpt-dist bench`: what a step costs on this machine, compared with other implementations of the same work in the same run."""
