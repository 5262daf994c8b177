"""``python -m hybridcore.cli``, where the script ``hybridcore`` is not on the path."""

from hybridcore.cli import app

if __name__ == "__main__":
    app(prog_name="hybridcore")
