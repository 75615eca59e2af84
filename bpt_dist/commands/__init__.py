"""What a user starts beside training; one file or folder a command."""
