"""Guards for other people's training loops: one module for each library, imported only when asked for."""
