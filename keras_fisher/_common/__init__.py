"""What all parts share: checks, precision, structures, random draws."""
