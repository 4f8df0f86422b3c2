"""What can be wrong with running statistics, one file for each finding, and how it is found."""
