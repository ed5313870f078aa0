"""What needs no network: settings, files, devices, processes, pictures, the log of a run."""
