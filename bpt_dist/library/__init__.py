"""The face of the package in Python: what `import bpt_dist` offers, over the same parts as the commands."""
