"""What a worked answer comes to."""

import re
from decimal import Decimal

_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?", re.ASCII)


def last_number(text: str) -> Decimal | None:
    """The last number of a text, which is where a worked answer has its result; None when there is none.

    Groups of three digits may be separated by commas: 1,234.50.
    """
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None
