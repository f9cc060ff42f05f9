"""A fleet: many engines on Ray Serve, and requests that go where their weights are (extra `ray`)."""
