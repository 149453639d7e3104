"""The API against its own description, by schemathesis: whatever it is asked, it answers as the description says."""

from __future__ import annotations

import pytest
from fake_source import FakeSource
from hypothesis import HealthCheck, Phase, settings

from potluck.coordinator.dashboard import server as web

schemathesis = pytest.importorskip("schemathesis")
EXAMPLES = 12  # of each address

schema = schemathesis.openapi.from_asgi("/api/openapi.json", web.app(FakeSource())).exclude(path="/api/stream")


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_every_answer_is_as_described(case: schemathesis.Case) -> None:
    case.call_and_validate()
