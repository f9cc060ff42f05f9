"""What a server tells of itself while it runs: log lines as JSON, and spans for OpenTelemetry."""
