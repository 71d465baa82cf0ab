"""STAGE 3: rollouts + rewards -> advantages."""
