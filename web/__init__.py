"""The page that runs the bundled models in a browser."""
