"""What every folder stands on: axes on a mesh, processes, parameters by name, checked dataclasses,
files that are whole or absent.
"""
