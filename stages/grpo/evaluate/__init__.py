"""evaluate: policy + held-out prompts -> eval_rollouts, eval_rewards. Made as by a stage; none reads it."""
