"""The version of the installed package."""

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    """As in pyproject.toml; "0+unknown" for a source folder that was never installed."""
    try:
        return version("cabochon")
    except PackageNotFoundError:
        return "0+unknown"
