"""What a finished stage leaves for others, and how it is read back."""
