"""STAGE 1: policy + prompts -> rollouts."""
