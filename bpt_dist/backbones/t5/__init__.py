"""T5: the stock modules, and a packed pass without padding."""
