"""What `import hybridcore` costs, each time in a fresh interpreter."""


def timeraw_import() -> str:
    return "import hybridcore"


def timeraw_import_numpy() -> str:
    """The part of it that is not ours."""
    return "import numpy"
