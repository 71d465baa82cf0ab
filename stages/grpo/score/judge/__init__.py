"""judge: a model behind an endpoint as a reward."""
