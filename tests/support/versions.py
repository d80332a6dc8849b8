"""What differs between the versions of transformers that the tests run with."""

from __future__ import annotations

import pytest
import transformers

MAJOR = int(transformers.__version__.partition(".")[0])


def needs_transformers(major: int, reason: str) -> pytest.MarkDecorator:
    """Skip a test with older versions of transformers, for a reason that lies in them."""
    return pytest.mark.skipif(major > MAJOR, reason=f"transformers {transformers.__version__}: {reason}")
