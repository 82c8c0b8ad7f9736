"""The packaged model behind a server in this process, as `tiny`, for all tests that only ask it."""

import pytest
from served import running_server

from hetero_glm5.config import EngineConfig, ServerConfig
from hetero_glm5.engine.engine import Engine
from hetero_glm5.model_config import DEMO_FOLDER
from hetero_glm5.server.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.from_folder(DEMO_FOLDER)


@pytest.fixture(scope="session")
def served(tokenizer):
    if not DEMO_FOLDER.exists():
        pytest.skip("the package was built without the demo model")
    flags = {"dtype": "float32", "max_total_tokens": 4096, "kt_cpuinfer": 1, "speculative_algorithm": "MTP"}
    config = EngineConfig(model=str(DEMO_FOLDER), device="cpu", **flags)
    parsers = ServerConfig(reasoning_parser="glm45", tool_call_parser="glm47")
    with running_server(lambda report: Engine.load(config, tokenizer, report), tokenizer, parsers, True) as served:
        assert served.worker.state == "ready", served.worker.failure
        yield served
