"""What a scripted engine says to the APIs of agents."""

PARSERS = {"reasoning_parser": "glm45", "tool_call_parser": "glm47"}
CALL = "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Köln</arg_value><arg_key>days</arg_key>"
CALL += "<arg_value>3</arg_value></tool_call>"


def pieces(text: str, size: int = 3):
    """For FakeEngine: `text` whatever the prompt, `size` characters in a step."""
    return lambda prompt: [text[i : i + size] for i in range(0, len(text), size)]


def starter(serve, fake_engine, connect):
    """start(text): `connect`'s client of a server whose model always says `text`; its server is client.served."""

    def start(said: str, engine=None, **flags):
        served = serve(engine or fake_engine(pieces(said)), **{**PARSERS, **flags})
        client = connect(served.url)
        client.served = served
        return client

    return start
