"""Reports in every output format. This package knows records and documents, and nothing of what they are about."""
