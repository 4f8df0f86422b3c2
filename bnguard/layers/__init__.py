"""Which modules carry running statistics, and what those hold."""
