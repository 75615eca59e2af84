"""`bpt-dist bench`: what a step costs here, beside what others would pay for the same work in the same run."""
