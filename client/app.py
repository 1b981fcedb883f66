"""Connect the centre to Flower: records become a request, and the reply becomes records.

Everything else is in client/federation/handlers.py.
"""

from __future__ import annotations

import logging
import os

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.federation.handlers import handle_request, refuse_malformed
from client.site.config import parse_site
from common.protocol.flower_records import from_records, to_records
from common.protocol.messages import Refusal, Reply, Request
from common.utils.error_reports import withhold_texts
from common.utils.errors import ConsiliumError, Refused
from common.utils.log_setup import configure_logging

log = logging.getLogger("consilium.centre")
app = ClientApp()
if os.environ.get("CONSILIUM_LOG"):  # not set in a simulation, which shows warnings only
    configure_logging()


def _handle_message(message: Message, context: Context) -> Message:
    return Message(content=to_records(_handle(message, context)), reply_to=message)


def _handle(message: Message, context: Context) -> Reply:
    """Return the reply to a message, whatever the coordinator has put into it."""
    try:
        site = parse_site(context.node_config)
    except ConsiliumError as error:  # the error may name a file, so its text stays in the centre's log
        log.error("%s", error)
        return Refusal("", "the centre's site settings are wrong; see the centre's log")
    if site.centre:  # no simulation: what a library prints about a scan would stand in the SuperNode's log
        withhold_texts()
    try:
        request = from_records(message.content)
    except Exception as error:  # a malformed message fails in many ways
        return refuse_malformed(site, Refused(f"the message cannot be read ({type(error).__name__})"))
    if not isinstance(request, Request):
        return refuse_malformed(site, Refused(f"a {type(request).__name__} is no request"))
    return handle_request(site, request)


app.query()(_handle_message)
app.train()(_handle_message)
