"""bnguard's core tests under other versions of torch and Python, each in an environment of its own."""
