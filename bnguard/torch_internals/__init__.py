"""All uses of torch's private and version-dependent API."""
