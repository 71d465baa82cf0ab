"""functions: reward functions, built in and the user's."""
