"""The embedded demo: a handwritten-digit classifier, its data, and the shifts that break it."""
