"""The server: requests batched step by step behind an OpenAI-compatible HTTP interface. It needs the extra `serve`."""
