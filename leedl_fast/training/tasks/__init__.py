"""One file per model: its data, its loss, how well it does, and what it makes."""
