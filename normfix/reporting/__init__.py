"""Records as pages and pictures; nothing here measures."""
