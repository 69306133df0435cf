"""What all tests share."""

from __future__ import annotations

from hypothesis import settings

# the machines that run the tests are shared: how long an example takes says nothing about the code
settings.register_profile("guardserve", deadline=None)
settings.load_profile("guardserve")
