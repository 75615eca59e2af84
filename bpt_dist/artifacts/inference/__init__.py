"""From exported prompts and rows to answers: one frozen model, a prompt for each task, rows of all tasks in one batch."""
