"""What a task is: fields, text form, label words, splits and metrics."""
