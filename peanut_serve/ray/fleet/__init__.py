"""What belongs to the replicas together: what operators want of them, what they have, and their metrics."""
