"""Networks from files: what is opened, and what it has to fit."""
