"""Jobs of several real processes."""
