"""Which rows a step computes: the chosen mechanisms, put together."""
