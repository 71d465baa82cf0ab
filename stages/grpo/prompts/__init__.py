"""prompts: the user's data -> the prompts table."""
