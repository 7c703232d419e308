"""Which entries: ranges of time, filters, and the reader that applies them."""
