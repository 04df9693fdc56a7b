"""From any checkpoint format to any other, one tensor at a time."""
