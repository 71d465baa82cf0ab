"""manage: looks after runs."""
