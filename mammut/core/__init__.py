"""The base that all other folders import.

It has the mesh axes, processes, named parameters, checked configs, and files that are written
whole.
"""
