"""What the tests of the server share."""

from tests.server.clients import demo as demo
