"""The choice of the origin that a model's URI names, with the agent's rights and its shared connections."""

from __future__ import annotations

from cache_agent.config import AgentConfig
from cache_agent.errors import BadModelURI
from cache_agent.model.origin import Origin
from cache_agent.model.uri import ModelURI
from cache_agent.tiers.hf import Hub, HubOrigin
from cache_agent.tiers.origin import FileOrigin
from cache_agent.tiers.s3 import S3, S3Origin


class Origins:
    """The origins that an agent can read, by scheme."""

    def __init__(self, config: AgentConfig) -> None:
        self._config = config
        self._s3 = S3(endpoint=config.s3_endpoint, anonymous=config.s3_anonymous)
        self._hub = Hub()

    def open(self, uri: ModelURI) -> Origin:
        """Return the origin of a model. Raises `BadModelURI`, `AccessDenied`, `BadSetting`."""
        match uri.scheme:
            case "file":
                return FileOrigin(uri, self._config.file_roots)
            case "s3":
                return S3Origin(uri, self._s3)
            case "hf":
                return HubOrigin(uri, self._hub)
            case scheme:
                raise BadModelURI(f"{uri.text}: this agent reads s3://, hf:// and file://, not {scheme}://")
