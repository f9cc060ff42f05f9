"""HTTP around the engine: the middleware in front of it and the admin API."""
