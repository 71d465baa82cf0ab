"""STAGE 2: rollouts + prompts -> rewards."""
