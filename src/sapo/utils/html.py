"""Data, policies and templates of pages that need nothing from outside."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any


def embedded(data: Any) -> str:
    """Return a JSON value as the text of a script element: no character of it can end the element or begin a comment.

    >>> embedded({"text": "</script><!--"})
    '{"text":"\\\\u003c/script\\\\u003e\\\\u003c!--"}'
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # Halves of surrogate pairs have no UTF-8; HTML and old JavaScript give the others a meaning of their own.
    return re.sub("[<>&\u2028\u2029\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def filled(template: str, fields: Mapping[str, str]) -> str:
    """Return a template with each {{name}} replaced by its field, in one pass: no mark in a field is replaced.

    >>> filled("<b>{{a}}</b>{{b}}", {"a": "{{b}}", "b": "2"})
    '<b>{{b}}</b>2'
    """
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: fields[mark[1]], template)


def content_security_policy(scripts: list[str], styles: list[str]) -> str:
    """Return a policy that admits just these inline scripts and styles, and no connection at all."""

    def hashes(texts: list[str]) -> str:
        digests = [base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in texts]
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes(scripts)}; style-src {hashes(styles)}; base-uri 'none'; "
        "form-action 'none'"
    )
