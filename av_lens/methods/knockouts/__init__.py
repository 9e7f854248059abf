"""Attention knockout: the method, and the windows of layers that it visits."""
