"""What updates running statistics, recorded as it happens."""
