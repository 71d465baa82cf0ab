"""evaluate: policy + held-out prompts -> eval_rollouts, eval_rewards. No stage, and no stage reads it."""
