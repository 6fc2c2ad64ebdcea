"""`python -m app`: the same as `gen serve`, for a source tree that is not installed."""

from app.server import serve_command

if __name__ == "__main__":
    serve_command(prog_name="python -m app")
