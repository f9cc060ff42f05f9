"""`peanut-serve ctl`: a client of the admin API, its commands and what they print."""
