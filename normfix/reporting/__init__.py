"""Turn records into pages and pictures; nothing here measures."""
