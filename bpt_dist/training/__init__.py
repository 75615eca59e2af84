"""What train.py is built on: a run, its stages, one step on this rank."""
