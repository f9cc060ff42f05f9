"""Layouts of training libraries that do not save in PEFT's form."""
