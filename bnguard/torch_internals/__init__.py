"""The one home of torch's private and version-dependent API."""
