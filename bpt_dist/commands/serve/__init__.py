"""`bpt-dist serve`: rows over HTTP, answered under the prompts of their tasks on one frozen model."""
