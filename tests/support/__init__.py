"""What test files share: independent references, small models and files, launched jobs, stand-ins for servers."""
