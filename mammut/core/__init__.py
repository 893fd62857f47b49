"""The base of all folders: mesh, processes, parameters by name, checked dataclasses, files."""
