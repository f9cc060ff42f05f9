"""Many teams at one server: their keys, what each may use and take, and what each has used."""
