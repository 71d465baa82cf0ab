"""pipeline: what runs next, and how."""
