"""The operations LanguageBind is made of; each module holds one op's contract and its torch implementation."""

from __future__ import annotations
