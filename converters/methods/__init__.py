"""What an adapter method computes: `g(W0; θ)`. One file per method; nothing else knows a formula."""
