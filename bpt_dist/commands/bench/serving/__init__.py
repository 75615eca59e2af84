"""`bench serve`: a real server under load from real clients, beside PEFT that switches its adapter for each task."""
