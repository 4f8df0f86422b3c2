"""What is wrong with running statistics, and how it shows."""
