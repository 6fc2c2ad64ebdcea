"""Front doors for browsers: the page and the REST interface.

Here live the Gradio page, the FastAPI app around it and the `gen serve` command. Nothing here draws: a click
becomes a `gen.Request`, `gen.jobs` runs it, and what is shown is read from events and from `gen.library`.
`app` imports `gen` and nothing below it.
"""
