"""What the user asks for: flags or a YAML merge spec, checked and with every default filled in."""
