"""GRPO as a data pipeline: generate -> score -> advantage -> update, every stage a table on disk."""

__version__ = "0.1.0"
