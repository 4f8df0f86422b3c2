"""One file a library: ``cases()`` lists its models."""
