"""The HTTP layer: the middleware in front of the engine, and the admin API."""
