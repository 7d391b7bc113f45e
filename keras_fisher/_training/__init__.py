"""Steps that measure Tr(F) and add penalties."""
