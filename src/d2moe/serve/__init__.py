"""The server: OpenAI's interface, metrics, live control and a page, over one engine. Needs the extra `serve`."""
