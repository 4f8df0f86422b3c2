"""Guards for training frameworks: one module for each, which imports the framework."""
