"""engines: what samples."""
