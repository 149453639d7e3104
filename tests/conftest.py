"""For all tests: hypothesis draws the same examples every time; POTLUCK_EXPLORE=1 lets it look further."""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("steady", derandomize=True, deadline=None)
if not os.environ.get("POTLUCK_EXPLORE"):
    settings.load_profile("steady")
