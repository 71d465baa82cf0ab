"""mirror: copies of runs in an S3 bucket, written behind each commit; restore, sql and verify read them."""
