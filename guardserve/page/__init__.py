"""The page at ``/ui``: is the model all right, since when, and what changed."""
