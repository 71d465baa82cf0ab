"""STAGE 4: policy + rollouts + advantages -> next policy, updates, logprobs."""
