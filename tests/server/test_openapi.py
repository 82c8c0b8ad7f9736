"""The OpenAPI document and the app, around a small random model: whatever a client sends, the answer is one that the
document names."""

from collections import Counter
from dataclasses import replace

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.generation import GenerationMode
from served import running_server
from tiny import tiny_checkpoint

from hetero_glm5.config import EngineConfig, ServerConfig
from hetero_glm5.engine.engine import Engine
from hetero_glm5.server.openapi import ROUTES
from hetero_glm5.server.tokenizer import Tokenizer

load_all_checks()
NAMES = ["not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"]
UNHURRIED = {"database": None, "deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


class Brief(Engine):
    """Answers of three tokens at most: what is asked for them matters here."""

    def add(self, tokens, params, **options):
        most = min(params.max_tokens or 3, 3)
        return super().add(tokens, replace(params, max_tokens=most, min_tokens=min(params.min_tokens, most)), **options)


@pytest.fixture(scope="module")
def served(checkpoints, tmp_path_factory):
    folder = str(tiny_checkpoint(checkpoints))
    tokenizer = Tokenizer.from_folder(folder)
    records = str(tmp_path_factory.mktemp("records"))
    flags = {
        "dtype": "float32",
        "max_total_tokens": 1024,
        "kt_cpuinfer": 1,
        "expert_distribution_recorder_dir": records,
    }
    config = EngineConfig(model=folder, device="cpu", **flags)
    parsers = ServerConfig(reasoning_parser="glm45", tool_call_parser="glm47")
    with running_server(lambda report: Brief.load(config, tokenizer, report), tokenizer, parsers, True) as served:
        assert served.worker.state == "ready", served.worker.failure
        yield served


def test_every_route_is_documented(served):
    routes = served.server.config.app.openapi()["paths"]  # FastAPI's own list: it knows nothing else of them
    assert {(path, *methods) for path, methods in routes.items()} == {(p, route.method) for p, route in ROUTES.items()}


def cases(operation):
    """Right ones and wrong ones, and small ones: of what a large one says, one field is refused, and the rest is not
    looked at."""
    right = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
    if not operation.body:
        return right
    return st.one_of(right, operation.as_strategy(generation_mode=GenerationMode.NEGATIVE), right.flatmap(smaller))


def smaller(case):
    if not isinstance(case.body, dict):
        return st.just(case)
    kept = st.sets(st.sampled_from(sorted(case.body)), max_size=2) if case.body else st.just(set())
    needed = ["messages", "prompt", "input", "text", "tokens", "tools", "rid"]
    needed += ["max_tokens"] if case.operation.path == "/v1/messages" else []

    def without_the_rest(names):
        case.body = {name: value for name, value in case.body.items() if name in names or name in needed}
        return case

    return kept.map(without_the_rest)


def answered(served, count: int) -> Counter[tuple[str, int]]:
    """How often which operation had which status, over `count` cases."""
    schema, seen = schemathesis.openapi.from_url(f"{served.url}/openapi.json"), Counter()
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) == len(ROUTES) - 1, "all but the document itself"

    @settings(max_examples=count, **UNHURRIED)
    @given(st.sampled_from(operations).flatmap(cases))
    def ask(case):
        answer = case.call(timeout=60)
        seen[case.operation.path, answer.status_code] += 1
        case.validate_response(answer, checks=CHECKS.get_by_names(NAMES))

    ask()
    return seen


def test_a_few_cases(served):
    seen = answered(served, 150)
    fine = sum(count for (_, status), count in seen.items() if status == 200)
    assert seen.total() >= 150 and fine >= 30 and seen.total() - fine >= 30, seen


@pytest.mark.slow
def test_two_thousand_cases(served):
    seen = answered(served, 2000)
    answerable = ROUTES.keys() - {"/openapi.json", "/v1/models/{name}", "/dump_expert_distribution_record"}
    assert seen.total() >= 2000 and all(seen[path, 200] for path in answerable), seen
    assert not served.worker.num_open and served.http.get("/health").status_code == 200
