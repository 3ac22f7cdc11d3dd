"""Methods, one paper a file; importing this package's files registers them (registry.load_methods does)."""
